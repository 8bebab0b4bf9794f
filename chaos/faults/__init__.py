"""Each file here is one fault: what it does to nodes, and how that is undone."""
