"""`python -m calib_nb` is the command `calib-nb`."""

import sys

from calib_nb.cli import main

if __name__ == "__main__":
    sys.exit(main())
