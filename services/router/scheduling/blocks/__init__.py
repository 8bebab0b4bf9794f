"""KV blocks: which are free, what those that are cached hold, and which requests share them."""
