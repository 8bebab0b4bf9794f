"""A stage: one layer range of the decoder with its paged KV cache."""
