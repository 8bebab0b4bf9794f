"""Mirror of chaos/."""
