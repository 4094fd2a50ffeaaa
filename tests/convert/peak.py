"""Peak memory of conversions: prints JSON, name -> bytes above what was held before.

peak.py FOLDER: a file of tables -> a run -> a file -> a run -> a file of tables.
"""

import json
import pathlib
import re
import sys

import runs
import small
import torch

from gemjax.embedding import layout_tables

# Three stacks of equal size, 96 MB: of 1, 2 and 3 units.
ROWS = {"user": 750_000, "item": 375_000, "seen": 375_000, "hour": 250_000}
DIM, UNITS = 32, {"item": 2, "hour": 3}


def status(field: str) -> int:
  text = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(rf"{field}:\s+(\d+)", text)[1])


def main(folder: pathlib.Path) -> None:
  data = small.write_data(folder / "data", ROWS)
  embedding = {"dim": DIM, "units": UNITS | {"seen": 2}}
  config = runs.config_of("gemjax", data, embedding)
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
  ):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = status("VmRSS")
    runs.convert(source, target, folder / input, folder / output, **options)
    peaks[f"{source} to {target}"] = status("VmHWM") - before
  features = small.features(ROWS)
  stacks = layout_tables(features, config.embedding).stacks
  largest = max(s.rows * s.width * 4 for s in stacks)
  print(json.dumps({"largest": largest, "peaks": peaks}))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
