"""Mirror of chaos/faults/."""
