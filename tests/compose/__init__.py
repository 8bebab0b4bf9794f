"""The mesh as Docker Compose runs it."""
