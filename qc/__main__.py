"""`python -m qc`: the command line, where the scripts of an environment are not on the path."""

import sys

from qc.cli import main

if __name__ == "__main__":
    sys.exit(main())
