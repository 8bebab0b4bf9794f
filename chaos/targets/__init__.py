"""Meshes that can be hurt: local ones, in containers, or on played hosts."""
