"""Blocks that requests share, since they begin alike: keys, the table of cached ones, who waits for whom."""
