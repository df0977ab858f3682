"""python -m tinysteer is the command tinysteer."""

import sys

from tinysteer.cli import main

sys.exit(main())
