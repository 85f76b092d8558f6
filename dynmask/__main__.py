"""``python -m dynmask`` is the ``dynmask`` command."""

import sys

from dynmask.cli import main

sys.exit(main())
