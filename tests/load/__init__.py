"""Many requests, rude clients, and what is left behind."""
