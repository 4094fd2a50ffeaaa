"""What narrow tables and narrow exchange cost in NE, on the simulator and on Frappe.

Every row is `launch/train.py` run to its summary on two virtual CPU devices that share the tables
by row, so that rows and gradients travel. `seed 1` and `seed 2` are float32 once more: what two
runs differ in anyway. GEMJAX_DATA is the folder that holds frappe_x1; without it the simulator is
all. Finished runs in GEMJAX_RUNS (default runs/precision) are not repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
TABLES, ROWS, GRADIENTS = (f"config.embedding.{n}dtype" for n in ("", "exchange_", "gradient_"))
HALF, EIGHTH = "bfloat16", "float8_e4m3fn"
VARIANTS: dict[str, dict[str, Any]] = {
  "float32": {},
  "seed 1": {"config.train.seed": 1},
  "seed 2": {"config.train.seed": 2},
  "bfloat16 tables": {TABLES: HALF},
  "float8 tables": {TABLES: EIGHTH},
  "bfloat16 rows travel": {ROWS: HALF},
  "bfloat16 gradients travel": {GRADIENTS: HALF},
  "bfloat16 tables, both travel": {TABLES: HALF, ROWS: HALF, GRADIENTS: HALF},
  "float8 tables, both travel": {TABLES: EIGHTH, ROWS: HALF, GRADIENTS: HALF},
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
  """Data set -> variant -> test NE, and by how much it is above that of float32, in percent."""
  data = pathlib.Path(os.environ.get("GEMJAX_DATA", "data"))
  runs = pathlib.Path(os.environ.get("GEMJAX_RUNS", "runs/precision"))
  figures: dict[str, Any] = {}
  for name, flags in SETS.items():
    if name != "demo":
      if not (data / "frappe_x1").exists():
        print(f"no {data / 'frappe_x1'}: set GEMJAX_DATA to measure {name}", flush=True)
        continue
      flags = flags | {"config.data.path": (data / "frappe_x1").absolute()}
    summaries = {
      variant: _trained(runs / name, flags | SHARED | changes)
      for variant, changes in VARIANTS.items()
    }
    ne = {variant: summary["test"]["ne"] for variant, summary in summaries.items()}
    figures[name] = {
      variant: {
        "ne": ne[variant],
        "percent_above_float32": 100 * (ne[variant] / ne["float32"] - 1),
        "auc": summary["test"]["auc"],
      }
      for variant, summary in summaries.items()
    }
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
