"""A checkpoint's files: configuration, names and shapes of tensors, weights, and parts of it."""
