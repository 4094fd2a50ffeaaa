"""Prepares raw data for training: fits its features and writes block records.

  python launch/prepare.py --dataset=frappe --input=RAW --output=DIR
  python launch/prepare.py --dataset=movielens-1m --download --input=RAW --output=DIR
  python launch/prepare.py --dataset=table --schema=FILE.toml --input=FILE_OR_FOLDER --output=DIR

The schema file is explained in gemjax/data/schema.py.
"""

import cli
from absl import flags

from gemjax.data.download import download
from gemjax.data.preparation import DATASETS, prepare
from gemjax.data.schema import SchemaError
from gemjax.train.termination import Termination

_DATASET = flags.DEFINE_string("dataset", None, f"One of {', '.join(DATASETS)}.")
_INPUT = flags.DEFINE_string("input", None, "File or folder of the raw data.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to make; must be new or empty.")
_SCHEMA = flags.DEFINE_string("schema", None, "TOML file that describes your own table.")
_HASH_ROWS = flags.DEFINE_integer("hash_rows", 0, "Hash all categories to so many rows.")
_MIN_COUNT = flags.DEFINE_integer("min_count", 0, "Call categories seen less often unknown.")
_DOWNLOAD = flags.DEFINE_bool("download", False, "Fetch the public set into --input first.")
_BASE = flags.DEFINE_string("download_base", None, "Address that replaces the publisher's.")


def main():
  for flag in (_DATASET, _INPUT, _OUTPUT):
    if not flag.value:
      raise SchemaError(f"--{flag.name} is missing; see launch/prepare.py --help")
  path = _INPUT.value
  with Termination(f"stopped by SIGTERM; nothing was written to {_OUTPUT.value}"):
    if _DOWNLOAD.value:
      path = download(_DATASET.value, path, base=_BASE.value)
    data = prepare(
      *(_DATASET.value, path, _OUTPUT.value, _SCHEMA.value),
      hash_rows=_HASH_ROWS.value,
      min_count=_MIN_COUNT.value,
    )
  f = data.features
  print(f"{data.path}: " + ", ".join(f"{n} {s.examples:,}" for n, s in data.splits.items()))
  print(
    f"{len(f.dense)} dense, {len(f.sparse)} sparse, {len(f.sequence)} sequence features, "
    + "".join(f"history {n} of {h.events:,} events, " for n, h in data.histories.items())
    + f"{sum(f.tables.values()):,} rows in {len(f.tables)} tables, labels {list(f.tasks)}"
  )
  for name, seen in data.origin.get("past", {}).items():
    counts = ", ".join(f"{n} {c:,}" for n, c in seen.items())
    print(f"rows with events of history {name!r} before them: {counts}")
  for task, known in data.origin.get("labelled", {}).items():
    print(f"rows with the label {task!r}: " + ", ".join(f"{n} {c:,}" for n, c in known.items()))


if __name__ == "__main__":
  cli.run(main, accelerated=False)
