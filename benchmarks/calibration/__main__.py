"""`python -m benchmarks.calibration`: run.py describes it."""

import sys

from benchmarks.calibration.run import main

if __name__ == "__main__":
    sys.exit(main())
