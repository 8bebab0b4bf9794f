"""Kills, stalls and cuts nodes of a mesh under load, and judges from the record whether anything was lost."""
