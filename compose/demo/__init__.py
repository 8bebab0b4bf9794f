"""The demo model: a small MoE that is trained here on tasks whose answers can be checked."""
