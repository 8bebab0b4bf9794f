"""The mesh thread: its loop, its sockets, steps on their way, and what it publishes."""
