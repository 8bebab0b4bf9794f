"""Which stage holds which layers: the slot of a stage, and its mirrors in and out."""
