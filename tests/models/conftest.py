"""The float64 oracles of layers serve the models, too."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "layers"))
