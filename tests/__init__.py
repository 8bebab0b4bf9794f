"""What the mesh is held to."""
