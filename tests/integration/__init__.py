"""Real processes, tiny models."""
