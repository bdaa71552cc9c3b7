"""`python -m reft_kernels`: see reft_kernels.cli."""

import os
import sys

from reft_kernels.cli import main
from reft_kernels.jobs.processes import launched

code = main()
if code and launched() > 1:
    # The other processes have ended or will be ended; to take leave of them in good order could wait for ever.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
