"""Which expert node holds which shards: placement, roles and the way from one to the next. Pure."""
