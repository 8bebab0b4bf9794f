"""One fault a file: what it does to nodes, and how that is undone."""
