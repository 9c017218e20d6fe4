"""``python -m loopkit``: the same program as ``loopkit``."""

import sys

from loopkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
