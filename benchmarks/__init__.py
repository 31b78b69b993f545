"""Everything that is claimed in numbers, measured: `python -m benchmarks` lists what there is."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))  # their models, texts and training loops
