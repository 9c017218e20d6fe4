from __future__ import annotations

import sys
from pathlib import Path

# The tests' own helper module, found whichever way pytest imports this folder.
sys.path.insert(0, str(Path(__file__).parent))
