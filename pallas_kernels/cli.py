"""What the report and the bench share: the ops, their flags, one sentence for an error."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# Every op is a folder of this package with a `shapes.py` and a `bench.py`.
OPS = (
  "jagged_attention",
  "jagged_pool",
  "embedding_bag",
  "jagged_dense",
  "jagged_concat",
  "jagged_matmul",
  "sum_runs",
  "rowwise_adagrad",
  "fm_interaction",
  "quantize_fp8",
)


class UsageError(ValueError):
  """A flag asks for what there is not."""


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
  """A parser with the flags that both binaries have."""
  found = argparse.ArgumentParser(
    prog=f"python -m {module}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  found.add_argument("--op", default=",".join(OPS), help="ops, by comma; default: all")
  found.add_argument("--json", help="file for the figures; default: none is written")
  return found


def listed(flag: str, text: str, known: Iterable[str]) -> list[str]:
  """The names of a flag's list, each once; UsageError where one is unknown or there is none."""
  known, names = list(known), list(dict.fromkeys(text.split(",")))
  for name in names:
    if name not in known:
      raise UsageError(f"{flag}={text}: {name!r} is not one of {', '.join(known)}")
  return names


def modules(part: str, ops: Iterable[str]) -> list[ModuleType]:
  """`pallas_kernels.<op>.<part>` of each op."""
  return [importlib.import_module(f"pallas_kernels.{op}.{part}") for op in ops]


def check_json(path: str | None) -> None:
  """UsageError where the file could not be written; asked before anything is measured."""
  if path is None:
    return
  folder = Path(path).parent
  if not folder.is_dir():
    raise UsageError(f"--json={path}: the folder {folder} does not exist; create it first")
  if Path(path).is_dir() or not path:
    raise UsageError(f"--json={path} must name a file, not a folder")
  if not os.access(path if Path(path).exists() else folder, os.W_OK):
    raise UsageError(f"--json={path} cannot be written; name a file that can")


def write_json(path: str | None, rows: Sequence[dict[str, Any]]) -> None:
  """Writes the rows as a list, where a file was asked for."""
  if path is not None:
    text = json.dumps(rows, indent=1, default=lambda number: number.item())  # NumPy's numbers.
    Path(path).write_text(text + "\n")


def run(main: Callable[[Sequence[str]], int]) -> None:
  """Exits with what `main(flags)` returns, or with 1 and its sentence where it refuses."""
  try:
    sys.exit(main(sys.argv[1:]))
  except (ValueError, OSError) as error:
    if isinstance(error, ValueError) and not type(error).__module__.startswith("pallas_kernels"):
      raise  # A defect of ours, to be seen in full.
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
