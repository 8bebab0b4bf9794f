"""A mesh of real processes, its clients, and what is seen of it."""
