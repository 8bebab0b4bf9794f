"""Checkpoints, tokenizers and references to compare with."""
