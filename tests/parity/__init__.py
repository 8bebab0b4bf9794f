"""The mesh beside transformers, and beside itself in other shapes."""
