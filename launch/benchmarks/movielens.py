"""GEM, the rankers that it is compared with, and GEM without each of its parts, on MovieLens.

Every row is `launch/train.py --config=configs/gem_movielens.py:NAME` run to its summary, with three
seeds. GEMJAX_DATA is the folder that holds ml-100k and ml-1m. Finished runs in GEMJAX_RUNS (default
runs/movielens) of the same config are not repeated, so that a suite that was interrupted goes on;
other code wants another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import runpy
import statistics
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "gem_movielens.py"
# Flags of each set.
SETS = {"ml-1m": ("--config.data.history=200",), "ml-100k": ()}
SEEDS = (0, 1, 2)
ABLATED = "ml-100k"  # The one set on which every part of GEM is taken away.
ALSO = ("next_event", "sum_mlp")  # What may be better than GEM is trained on both.
FIGURES = {
  "valid_ne": lambda s: s["valid"]["ne"],
  "auc": lambda s: s["test"]["auc"],
  "gauc": lambda s: s["test"]["gauc"],
  "ne": lambda s: s["test"]["ne"],
  "dense": lambda s: s["params"]["dense"],
  "embedding": lambda s: s["params"]["embedding"],
  "mflop": lambda s: 1e3 * s["gflop_per_example"],
  "examples_per_second": lambda s: s["train"]["examples_per_second"],
}


def run() -> dict[str, Any]:
  """Data set -> row -> mean of every figure, and the deviation of NE and AUC over the seeds."""
  data = pathlib.Path(os.environ.get("GEMJAX_DATA", "data"))
  runs = pathlib.Path(os.environ.get("GEMJAX_RUNS", "runs/movielens"))
  figures: dict[str, Any] = {name: {} for name in SETS}
  for name, flags in SETS.items():
    prepared = prepared_data(name, data / name, runs / f"{name}-data")
    rows = models() + (ablations() if name == ABLATED else ALSO)
    for row in rows:
      folder = runs / name / f"{row}-{digest(row, *flags)}"
      summaries = [trained(row, seed, prepared, folder / str(seed), *flags) for seed in SEEDS]
      figures[name][row] = _mean(summaries)
  for name, rows in figures.items():
    print(f"\n{name}\n" + "\n".join(table(rows)), flush=True)
  return figures


def models() -> tuple[str, ...]:
  """Names of GEM, a light one and what they are compared with."""
  return (*runpy.run_path(str(CONFIG))["MODELS"], "light")


def ablations() -> tuple[str, ...]:
  """Names of the variants of GEM."""
  return tuple(runpy.run_path(str(CONFIG))["ABLATIONS"])


def digest(row: str, *flags: str) -> str:
  """Of the config and flags, so that runs of another one are not taken for its own."""
  config = runpy.run_path(str(CONFIG))["get_config"](row)
  text = json.dumps([config.to_json(), flags], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def table(rows: dict[str, dict[str, float]]) -> list[str]:
  """Markdown, the best NE first."""
  lines = [
    "| model | valid NE | test NE | AUC | GAUC | dense | embedding | MFLOP/example | examples/s |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, row in sorted(rows.items(), key=lambda item: item[1]["ne"]):
    lines.append(
      f"| {name} | {row['valid_ne']:.4f} | {row['ne']:.4f} ± {row['ne_deviation']:.4f} "
      f"| {row['auc']:.4f} ± {row['auc_deviation']:.4f} | {row['gauc']:.4f} | {row['dense']:,.0f} "
      f"| {row['embedding']:,.0f} | {row['mflop']:.2f} | {row['examples_per_second']:,.0f} |"
    )
  return lines


def prepared_data(name: str, raw: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
  """The folder `path`, prepared from the folder `raw` of the set `name` unless it is there."""
  if not (path / "manifest.json").is_file():
    dataset = {"ml-1m": "movielens-1m", "ml-100k": "movielens-100k"}[name]
    _launch("prepare.py", f"--dataset={dataset}", f"--input={raw}", f"--output={path}")
  return path


def trained(
  row: str, seed: int, data: pathlib.Path, workdir: pathlib.Path, *flags: str
) -> dict[str, Any]:
  """The summary of a run of the row, read where it has ended before."""
  summary = workdir / "summary.json"
  if not summary.is_file():
    print(f"{workdir}", flush=True)
    _launch(
      "train.py",
      f"--config={CONFIG}:{row}",
      f"--workdir={workdir}",
      f"--config.data.path={data}",
      f"--config.train.seed={seed}",
      f"--config.compilation.cache={workdir.parent / 'compiled'}",  # One compilation for all seeds.
      *flags,
    )
  return json.loads(summary.read_text())


def _launch(binary: str, *flags: str) -> None:
  command = [sys.executable, str(ROOT / "launch" / binary), *flags]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    sys.exit(f"error: {' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def _mean(summaries: list[dict[str, Any]]) -> dict[str, float]:
  out = {}
  for figure, of in FIGURES.items():
    values = [of(s) for s in summaries]
    out[figure] = statistics.mean(values)
    if figure in ("ne", "auc"):
      out[f"{figure}_deviation"] = statistics.stdev(values)
  return out
