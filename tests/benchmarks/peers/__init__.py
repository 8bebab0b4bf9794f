"""The mesh beside other engines, on the same weights: `make bench-peers`."""
