"""Where the code under test lies, also for processes of their own."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "launch")))
