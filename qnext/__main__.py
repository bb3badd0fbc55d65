"""`python -m qnext` is `qnext`: what torchrun starts."""

import sys

from qnext.cli import main

if __name__ == "__main__":
    sys.exit(main())
