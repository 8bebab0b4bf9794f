"""The direction of imports and the shape of the tree, read from the sources."""
