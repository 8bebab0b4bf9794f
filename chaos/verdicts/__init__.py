"""From a history to verdicts and to a report for people."""
