"""What several tests build on: checkpoints, a reference, builders."""
