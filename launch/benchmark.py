"""Measures one part of the project and prints its figures; every ratio comes from one run.

python launch/benchmark.py --suite=data --json=data.json
"""

import importlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import cli
from absl import flags

_SUITES = (
  "bfloat16",
  "checkpoint",
  "data",
  "history",
  "movielens",
  "precision",
  "sharding",
  "start_up",
  "train_step",
)  # Modules of launch/benchmarks with a `run`.
_SUITE = flags.DEFINE_enum("suite", None, _SUITES, "What to measure.", required=True)
_JSON = flags.DEFINE_string("json", None, "File for the figures.")


def main():
  # Minutes of measuring should not end in a bad path.
  if _JSON.value and not (folder := pathlib.Path(_JSON.value).absolute().parent).is_dir():
    raise NotADirectoryError(f"--json={_JSON.value}: {folder} is no folder; make it first")
  try:
    suite = importlib.import_module(f"benchmarks.{_SUITE.value}")
  except ImportError as error:  # A peer that is not installed.
    sys.exit(f"error: {error}")
  figures = suite.run()
  for line in _lines(figures):
    print(line)
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=1) + "\n")


def _lines(figures: dict[str, Any], path: str = "") -> Iterator[str]:
  """One for every figure, and one for every group of figures that holds no further group."""
  number = lambda value: "-" if value is None else format(value, ",.4g")
  for key, value in figures.items():
    name = f"{path} {key}".lstrip()
    if not isinstance(value, dict):
      yield f"{name:<40} {number(value)}"
    elif any(isinstance(v, dict) for v in value.values()):
      yield from _lines(value, name)
    else:
      yield f"{name:<40} " + " ".join(f"{k} {number(v):<10}" for k, v in value.items())


if __name__ == "__main__":
  cli.run(main)
