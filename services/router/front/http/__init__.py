"""Connections: server, limits, bodies, foreign origins, and answers as HTTP."""
