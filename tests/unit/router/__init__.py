"""Tests of the router, without sockets."""
