"""Modules by themselves: no sockets, no sleep."""
