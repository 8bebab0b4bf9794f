"""Conversations as agents have them, on the mesh and on other engines."""
