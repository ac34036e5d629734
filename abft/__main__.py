"""``python -m abft``: the command line."""

import sys

from abft.cli import main

sys.exit(main(sys.argv[1:]))
