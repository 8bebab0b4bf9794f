"""What the demo model learns, one task a file: how a question is drawn, phrased, answered and checked."""
