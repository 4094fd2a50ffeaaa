"""What narrow numbers cost in NE, on the simulator and on Frappe.

Every row is `launch/train.py` run to its summary with every seed, on two virtual CPU devices that
share the tables by row, so that rows and gradients travel. A row's figures are means over seeds of
how far its training loss and its test NE are above those of the row that it is held against, same
seed and batches by same seed and batches, in percent, each with the standard error of that mean:
below it a difference says nothing.
GEMJAX_DATA is the folder that holds frappe_x1; without it the simulator is all. Finished runs in
GEMJAX_RUNS (default runs/precision) are not repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
SEEDS = (0, 1, 2)
TABLES, ROWS, GRADIENTS = (f"config.embedding.{n}dtype" for n in ("", "exchange_", "gradient_"))
COMPUTED = "config.train.dtype"
HALF, EIGHTH = "bfloat16", "float8_e4m3fn"
WHOLE = "float32"  # What all others but those IN_HALF are held against.
HALF_ROW = "computed in bfloat16"
VARIANTS: dict[str, dict[str, Any]] = {
  WHOLE: {},
  "bfloat16 tables": {TABLES: HALF},
  "float8 tables": {TABLES: EIGHTH},
  "bfloat16 rows travel": {ROWS: HALF},
  "float8 rows travel": {ROWS: EIGHTH},
  "bfloat16 gradients travel": {GRADIENTS: HALF},
  "float8 gradients travel": {GRADIENTS: EIGHTH},
  "bfloat16 tables, both travel": {TABLES: HALF, ROWS: HALF, GRADIENTS: HALF},
  "float8 tables, both travel in bfloat16": {TABLES: EIGHTH, ROWS: HALF, GRADIENTS: HALF},
  "rows read ahead": {"config.embedding.lookup": "ahead"},
  HALF_ROW: {COMPUTED: HALF},
}
# Held against HALF_ROW, whose arithmetic they share.
IN_HALF: dict[str, dict[str, Any]] = {
  "bfloat16, products of MLPs in float8": {"config.train.float8_mlp": True},
  "bfloat16, activations kept in float8": {"config.memory.activations": "float8"},
}
SETS: dict[str, dict[str, Any]] = {
  "demo": {
    "config": "configs/wukong_demo.py",
    "config.data.demo_examples": 200_000,
    "config.train.epochs": 1,
  },
  "frappe": {"config": "configs/wukong_frappe.py", "config.train.epochs": 2},
}
SHARED = {
  "config.mesh.data": 1,
  "config.mesh.model": 2,
  "config.embedding.replicated_rows": 0,
}


def run() -> dict[str, Any]:
  """Data set -> variant -> means of test NE and AUC, how far above in percent, and the errors."""
  data = pathlib.Path(os.environ.get("GEMJAX_DATA", "data"))
  runs = pathlib.Path(os.environ.get("GEMJAX_RUNS", "runs/precision"))
  figures: dict[str, Any] = {}
  for name, flags in SETS.items():
    if name != "demo":
      if not (data / "frappe_x1").exists():
        print(f"no {data / 'frappe_x1'}: set GEMJAX_DATA to measure {name}", flush=True)
        continue
      flags = flags | {"config.data.path": (data / "frappe_x1").absolute()}
    flags = flags | SHARED
    of = lambda changes, flags=flags, name=name: [
      _trained(runs / name, flags | changes | {"config.train.seed": seed}) for seed in SEEDS
    ]
    found = {variant: of(changes) for variant, changes in VARIANTS.items()}
    found |= {variant: of({COMPUTED: HALF} | changes) for variant, changes in IN_HALF.items()}
    figures[name] = {
      variant: _against(summaries, found[HALF_ROW if variant in IN_HALF else WHOLE])
      for variant, summaries in found.items()
    }
  return figures


def _against(summaries: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, float]:
  figures = {name: statistics.mean(s["test"][name] for s in summaries) for name in ("ne", "auc")}
  for split, name in (("train", "loss"), ("test", "ne")):
    pairs = zip(summaries, others, strict=True)
    above = [100 * (one[split][name] / other[split][name] - 1) for one, other in pairs]
    figures[f"{split}_{name}_percent_above"] = statistics.mean(above)
    figures[f"{split}_{name}_error"] = statistics.stdev(above) / len(above) ** 0.5
  return figures


def _trained(runs: pathlib.Path, flags: dict[str, Any]) -> dict[str, Any]:
  text = json.dumps(flags, sort_keys=True, default=str)
  workdir = runs.absolute() / hashlib.sha256(text.encode()).hexdigest()[:8]
  if not (workdir / "summary.json").is_file():
    command = [sys.executable, str(ROOT / "launch/train.py"), f"--workdir={workdir}"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    print(" ".join(command[1:]), flush=True)
    devices = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    done = subprocess.run(
      command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
      sys.exit(f"error: {' '.join(command)} failed: {done.stderr.strip()[-500:]}")
  return json.loads((workdir / "summary.json").read_text())
