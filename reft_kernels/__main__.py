"""`python -m reft_kernels`: see reft_kernels.cli."""

import sys

from reft_kernels.cli import main

sys.exit(main())
