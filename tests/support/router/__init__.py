"""The router without nodes: mesh shapes, simulated stages and experts, plans in a few letters."""
