"""What the ops need and what they visit, and the XLA fallback beside what it replaces.

python -m pallas_kernels.bench [--op=jagged_pool] [--quick] [--json=FILE]

FLOPs and bytes are counted by formula. Times are medians on this machine, all sides called in
turns; with a GPU, of the kernels as well. Attention is then measured against cuDNN and tokamax.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels import cli

COLUMNS = {  # JSON key: title, width, format.
  "op": ("op", -22, "{}"),
  "shape": ("shape", -34, "{}"),
  "flops_needed": ("FLOPs", 9, "{:.2e}"),
  "bytes_needed": ("bytes", 9, "{:.2e}"),
  "flops_visited": ("visited", 9, "{:.2e}"),
  "tiles_visited": ("tiles", 9, "{:,}"),
  "useful_tile_share": ("useful", 7, "{:.1%}"),
  "xla_ms": ("XLA ms", 9, "{:.2f}"),
  "padded_ms": ("other ms", 9, "{:.2f}"),
  "xla_over_padded_speed": ("faster", 7, "{:.2f}x"),
  "triton_ms": ("kernel ms", 9, "{:.3f}"),
  "triton_over_padded_speed": ("faster", 7, "{:.2f}x"),
  "baseline": ("than", -30, "{}"),
}


def main(argv: Sequence[str]) -> int:
  """Prints the table."""
  parser = cli.parser("pallas_kernels.bench", __doc__)
  parser.add_argument("--quick", action="store_true", help="small sizes; times then mean nothing")
  flags = parser.parse_args(argv)
  ops = cli.listed("--op", flags.op, cli.OPS)
  cli.check_json(flags.json)
  gpu = _has_gpu()
  rows, start = {}, time.perf_counter()
  modules = cli.modules("bench", ops)
  print(_line({name: title for name, (title, _, _) in COLUMNS.items()}))
  for module in modules:
    for row in module.rows(flags.quick):
      print(_line(_cells({"baseline": "padded dense"} | row)), flush=True)
      rows[row["op"], row["shape"]] = row
  if gpu:
    for module in modules:
      for row in getattr(module, "gpu_rows", tuple)():
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.setdefault((row["op"], row["shape"]), {}).update(row)
  else:
    print(
      "TFLOP/s on a GPU, and the comparison with tokamax and cuDNN, were not measured: "
      "this machine has no GPU."
    )
  cli.write_json(flags.json, list(rows.values()))
  print(f"{len(rows)} rows, {time.perf_counter() - start:.1f} s")
  return 0


def _has_gpu() -> bool:
  try:
    ctypes.CDLL("libcuda.so.1")
  except OSError:
    # Without a driver the CUDA wheels would log a traceback.
    jax.config.update("jax_platforms", "cpu")
  return jax.default_backend() == "gpu"


def _cells(row: dict[str, Any]) -> dict[str, str]:
  return {
    name: "-" if row.get(name) is None else form.format(row[name])
    for name, (_, _, form) in COLUMNS.items()
  }


def _line(cells: dict[str, str]) -> str:
  """A row of the table; negative widths align to the left."""
  widths = {name: width for name, (_, width, _) in COLUMNS.items()}
  return " ".join(
    f"{cells[name]:<{-width}}" if width < 0 else f"{cells[name]:>{width}}"
    for name, width in widths.items()
  ).rstrip()


if __name__ == "__main__":
  cli.run(main)
