"""How a mesh is put together on one machine: the command line, the containers, the tiny default model."""
