"""``python -m ddim_ode``."""

import sys

from ddim_ode.cli import main

sys.exit(main())
