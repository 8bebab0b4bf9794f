"""What is timed, never asserted on a clock."""
