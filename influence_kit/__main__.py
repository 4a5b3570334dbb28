"""`python -m influence_kit`: see `python -m influence_kit --help`."""

import sys

from influence_kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
