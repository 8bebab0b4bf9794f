"""Histories to plant damage in, and a mesh that is a list of names."""
