"""Processes of this host: supervisor, children and forks, locks, and the memory that they may take."""
