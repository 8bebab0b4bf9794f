"""Drafts: what is guessed to come next, how often that is right, and how many rows it is worth."""
