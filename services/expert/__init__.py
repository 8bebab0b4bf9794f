"""An expert node: holds expert shards and runs their gated FFNs."""
