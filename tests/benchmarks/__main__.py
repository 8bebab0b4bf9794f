"""`make bench`."""

from __future__ import annotations

import sys

from tests.benchmarks.serve_benchmark import main

if __name__ == "__main__":
    sys.exit(main())
