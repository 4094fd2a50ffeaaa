"""Peak memory of conversions: prints JSON, name -> what was held above what was held before, as a
multiple of the largest array.

peak.py FOLDER: a file of tables -> a run -> a file -> a run -> a file of tables, and both run and
file -> a run whose tables are twice as long.
"""

import dataclasses
import json
import pathlib
import re
import sys

import runs
import small
import torch

from gemjax.data.prepared import open_prepared
from gemjax.embedding import layout_tables

# Three stacks of equal size, 96 MB: of 1, 2 and 3 units.
ROWS = {"user": 750_000, "item": 375_000, "seen": 375_000, "hour": 250_000}
DIM, UNITS = 32, {"item": 2, "hour": 3}


def status(field: str) -> int:
  text = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(rf"{field}:\s+(\d+)", text)[1])


def write_hashed(path: pathlib.Path, rows: dict[str, int]) -> pathlib.Path:
  features = small.features(rows)
  hashed = tuple(dataclasses.replace(f, encoding="hash") for f in features.sparse)
  features = dataclasses.replace(features, sparse=hashed)
  return small.write_data(path, rows, features=features)


def largest(config) -> int:
  """Bytes of a run's largest array."""
  stacks = layout_tables(open_prepared(config.data.path).features, config.embedding).stacks
  return max(s.rows * s.width * 4 for s in stacks)


def main(folder: pathlib.Path) -> None:
  data = write_hashed(folder / "data", ROWS)
  embedding = {"dim": DIM, "units": UNITS | {"seen": 2}}
  config = runs.config_of("gemjax", data, embedding)
  twice = write_hashed(folder / "twice", {n: 2 * (rows - 2) + 2 for n, rows in ROWS.items()})
  grown = runs.config_of("gemjax", twice, embedding)
  tables = {name: rows for name, rows in ROWS.items() if name != "seen"}
  width = lambda name: DIM * UNITS.get(name, 1)
  weights = {f"embedding_bags.{n}.weight": torch.randn(r, width(n)) for n, r in tables.items()}
  torch.save(weights, folder / "a.pt")
  del weights
  warm = runs.config_of("gemjax", small.write_data(folder / "few"), embedding)
  few = {f"embedding_bags.{n}.weight": torch.zeros(small.SIZES[n], width(n)) for n in tables}
  torch.save(few, folder / "few.pt")
  # Imports, XLA's threads and the like are paid for by a conversion of next to nothing.
  runs.convert("torchrec", "gemjax", folder / "few.pt", folder / "few_run", config=warm)
  runs.convert("gemjax", "safetensors", folder / "few_run", folder / "few.safetensors")
  peaks = {}
  for source, target, input, output, options in (
    ("torchrec", "gemjax", "a.pt", "b", {"config": config}),
    ("gemjax", "safetensors", "b", "c.safetensors", {}),
    ("safetensors", "gemjax", "c.safetensors", "d", {}),
    ("gemjax", "torchrec", "d", "e.pt", {}),
    ("gemjax", "gemjax", "b", "f", {"config": grown}),
    ("safetensors", "gemjax", "c.safetensors", "g", {"config": grown}),
  ):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = status("VmRSS")
    runs.convert(source, target, folder / input, folder / output, **options)
    peak = status("VmHWM") - before
    peaks[f"{input} to {output}"] = peak / largest(options.get("config", config))
  print(json.dumps(peaks))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
