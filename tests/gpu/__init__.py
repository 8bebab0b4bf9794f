"""What only a GPU can show: its arithmetic, its memory, whole meshes on it. `make gpu-test`."""
