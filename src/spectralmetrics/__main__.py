"""``python -m spectralmetrics``."""

import sys

from spectralmetrics.cli import main

sys.exit(main())
