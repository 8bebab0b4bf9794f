"""The three services of a mesh: router, stage, expert. None imports another."""
