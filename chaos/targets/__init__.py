"""Meshes that can be hurt, local ones, in containers or on played hosts, and the tools that do it."""
