"""What every moemesh process shares: names, messages, codec, transport, weights, settings."""
