"""Compute kernels that stage and expert nodes share; the bits of a row depend on that row and the weights alone."""
