"""``python -m sidecar``: the same as the console script ``sglang-weight-sync``."""

import sys

from sidecar import main

sys.exit(main())
