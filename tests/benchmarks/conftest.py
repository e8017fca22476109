"""Scripts of benchmarks/ import each other as a script finds them: from their own folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
