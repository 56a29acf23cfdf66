"""Let tests import the suite from a checkout, whatever directory pytest is started in."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
