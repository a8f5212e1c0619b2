import sys

from tinyldm.cli import main

sys.exit(main())
