import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import benchmark  # noqa: F401  sets TRITON_INTERPRET where there is no GPU, before any test imports the kernel
