"""The HTTP front without a mesh, its journals and its disks."""
