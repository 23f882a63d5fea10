"""`python -m linearize` is the command `linearize`."""

import sys

from linearize.cli import main

sys.exit(main())
