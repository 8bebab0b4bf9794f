"""The half of a layer that lies between two feed-forward networks, as one callable."""
