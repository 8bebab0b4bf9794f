"""Load on a mesh, what is seen of it meanwhile, and the history that both are written down in."""
