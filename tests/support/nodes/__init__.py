"""Stages, ranks and experts in the process of the test, on processors or a simulated GPU."""
