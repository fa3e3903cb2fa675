"""`python -m benchmarks.calibration`: see run.py."""

import sys

from benchmarks.calibration.run import main

if __name__ == "__main__":
    sys.exit(main())
