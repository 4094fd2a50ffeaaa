"""Measures one part of the project and prints its figures; every ratio comes from one run.

python launch/benchmark.py --suite=data --json=data.json
"""

import importlib
import json
import pathlib
import sys

import cli
from absl import flags

_SUITES = ("data", "train_step")  # Modules of launch/benchmarks with a `run`.
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
  for key, value in figures.items():
    print(f"{key:<32} {value:,.4g}")
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
  cli.run(main)
