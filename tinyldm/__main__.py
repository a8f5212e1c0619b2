"""`python -m tinyldm` is the command line."""

import sys

from tinyldm.cli import main

sys.exit(main())
