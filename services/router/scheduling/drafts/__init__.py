"""Tokens that are guessed to come next: where guesses come from, and how many of them are worth their rows."""
