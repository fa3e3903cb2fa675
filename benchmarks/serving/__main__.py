"""`python -m benchmarks.serving`: see run.py."""

import sys

from benchmarks.serving.run import main

if __name__ == "__main__":
    sys.exit(main())
