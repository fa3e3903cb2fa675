"""`python -m benchmarks.serving`: run.py describes it."""

import sys

from benchmarks.serving.run import main

if __name__ == "__main__":
    sys.exit(main())
