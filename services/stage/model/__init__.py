"""The decoder in reading order: linear, norm, rope, attention, gate, block, sampling."""
