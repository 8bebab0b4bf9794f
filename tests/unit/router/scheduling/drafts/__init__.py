"""Tests of drafts: where they come from, and how many there are."""
