"""The ranks of a stage."""
