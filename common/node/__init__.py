"""What every stage and expert process has: its link to the router, its start and end, its loading thread."""
