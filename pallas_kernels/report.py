"""What the compilers make of every kernel, on a machine that needs no GPU.

python -m pallas_kernels.report --target=sm_80,sm_90a,sm_100a [--op=jagged_pool] [--json=FILE]

Every case of the ops' `shapes.py`, forward and backward, is compiled for each target with the CUDA
wheels, and a row is printed for each of our kernels. Exit code 1, with a sentence for each defect,
if a kernel spills or has a stack frame, multiplies matrices without tensor cores, asks for more
shared memory than a block can have, or is not the one that its case names. The occupancy is a
bound by the resources of a multiprocessor, never a measurement.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels import cli
from pallas_kernels.case import Case
from pallas_kernels.deviceless.compile import Kernel, compile_kernels
from pallas_kernels.deviceless.occupancy import occupancy_bound
from pallas_kernels.deviceless.target import TARGETS, Target, check_cuda_wheels

# A GPU of each architecture; h200 differs from h100 in its memory alone.
ARCHITECTURES = {TARGETS[name].arch: TARGETS[name] for name in ("a100", "h100", "b200")}
MOSAIC = "sm_90a"  # The only one that Mosaic kernels are written for.
COLUMNS = {
  "target": -8,
  "op": -22,
  "implementation": -7,
  "direction": -9,
  "shape": -30,
  "kernel": -38,
  "registers": 5,
  "spill_bytes": 6,
  "stack_bytes": 6,
  "shared_memory_bytes": 7,
  "tensor_core_instructions": 7,
  "threads": 8,
  "occupancy_bound": 10,
}
TITLES = {
  "implementation": "by",
  "registers": "regs",
  "spill_bytes": "spill",
  "stack_bytes": "stack",
  "shared_memory_bytes": "shared",
  "tensor_core_instructions": "tensor",
  "occupancy_bound": "occupancy",
}


def main(argv: Sequence[str]) -> int:
  """Prints the report; 1 if a kernel has a defect, else 0."""
  parser = cli.parser("pallas_kernels.report", __doc__)
  parser.add_argument("--target", default=",".join(ARCHITECTURES), help="by comma")
  flags = parser.parse_args(argv)
  archs = cli.listed("--target", flags.target, ARCHITECTURES)
  ops = cli.listed("--op", flags.op, cli.OPS)
  cli.check_json(flags.json)
  check_cuda_wheels()
  # Before JAX looks for devices: its CUDA plugin would look for a driver. A program that comes out
  # of a cache is not dumped.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  rows, defects, start = [], [], time.perf_counter()
  print(_line({name: TITLES.get(name, name) for name in COLUMNS}))
  for arch in archs:
    begun = time.perf_counter()
    for module in cli.modules("shapes", ops):
      for case in module.report_cases():
        found, wrong = examine(case, ARCHITECTURES[arch])
        for row in found:
          print(_line(row), flush=True)
        rows += found
        defects += wrong
    print(f"{arch}: {time.perf_counter() - begun:.1f} s", flush=True)
  cli.write_json(flags.json, rows)
  for defect in defects:
    print(f"DEFECT {defect}", file=sys.stderr)
  print(f"{len(rows)} kernels, {len(defects)} defects, {time.perf_counter() - start:.1f} s")
  return int(bool(defects))


def examine(case: Case, target: Target) -> tuple[list[dict[str, Any]], list[str]]:
  """A row for each kernel of a case on a target, and a sentence for each defect."""
  if case.implementation == "mosaic" and target.arch != MOSAIC:
    return [], []
  about = {
    "op": case.op,
    "implementation": case.implementation,
    "target": target.arch,
    "direction": case.direction,
    "shape": case.shape,
  }
  where = " ".join(about.values())
  try:
    kernels = compile_kernels(case.fn, case.args, target)
  except jax.errors.JaxRuntimeError as error:
    return [], [f"{where}: does not compile: {str(error).splitlines()[0]}"]
  defects = [f"{where}: {sentence}" for sentence in _defects(case, kernels, target)]
  return [about | _figures(kernel, target) for kernel in kernels], defects


def _figures(kernel: Kernel, target: Target) -> dict[str, Any]:
  return {
    "kernel": kernel.name,
    "registers": kernel.registers,
    "spill_bytes": kernel.spill_bytes,
    "stack_bytes": kernel.stack_bytes,
    "shared_memory_bytes": kernel.shared_bytes,
    "tensor_core_instructions": kernel.tensor_cores,
    "threads": kernel.threads,
    "occupancy_bound": occupancy_bound(
      target,
      registers=kernel.registers,
      shared_bytes=kernel.shared_bytes,
      threads=kernel.threads,
      tensor_columns=kernel.tensor_columns,
    ),
  }


def _defects(case: Case, kernels: list[Kernel], target: Target) -> list[str]:
  found = []
  names = {k.name for k in kernels}
  for name in case.kernels.keys() - names:
    found.append(f"kernel {name} was not compiled, only {', '.join(sorted(names)) or 'none'}")
  for name in names - case.kernels.keys():
    found.append(f"kernel {name} is not named by its case, which names {', '.join(case.kernels)}")
  for k in kernels:
    if k.arch != target.arch:
      found.append(f"kernel {k.name} was compiled for {k.arch}")
    if k.spill_bytes:
      found.append(f"kernel {k.name} spills {k.spill_bytes} bytes with {k.registers} registers")
    if k.stack_bytes:
      found.append(f"kernel {k.name} has a stack frame of {k.stack_bytes} bytes")
    if k.shared_bytes > target.shared_bytes_per_block:
      found.append(
        f"kernel {k.name} asks for {k.shared_bytes} bytes of shared memory, "
        f"a block can have {target.shared_bytes_per_block}"
      )
    if case.kernels.get(k.name) and not k.tensor_cores:
      found.append(f"kernel {k.name} multiplies matrices without tensor cores")
  return found


def _line(row: dict[str, Any]) -> str:
  """A row of the table; negative widths align to the left."""
  cells = []
  for name, width in COLUMNS.items():
    value = row[name]
    text = f"{value:.0%}" if isinstance(value, float) else str(value)
    cells.append(f"{text:<{-width}}" if width < 0 else f"{text:>{width}}")
  return " ".join(cells)


if __name__ == "__main__":
  cli.run(main)
