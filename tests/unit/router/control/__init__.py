"""Tests of who does what in the mesh."""
