"""What a plan says: figures for JSON, and lines for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gemjax.plan.estimate import by_module, module_of
from gemjax.plan.memory import largest_buffers
from gemjax.plan.rates import RATES, REACHED
from gemjax.plan.target import Topology
from gemjax.plan.training import PlannedStep

MODEL = f"roofline of XLA's schedule at {REACHED:.0%} of datasheet rates, not a measurement"
COUNT = 10  # Of the largest and costliest.
HIDDEN = 0.1  # A collective is hidden if less of its time is exposed.


def figures(step: PlannedStep, topology: Topology) -> dict[str, Any]:
  """Of one device and one step.

    tensor_core_flop_share   matrix FLOPs in cuBLAS products and kernels / all that the program does
    fp8_flop_share           of these the ones with fp8 operands
    estimated_mfu            model FLOPs / (estimated_step_seconds * peak in bfloat16)

  All FLOPs are the larger of those in the compiled program and those of the model, so that a
  product which XLA made a sum of something else counts as one that is not on tensor cores.
  """
  done, held = step.estimate, step.budget
  rates = RATES[topology.target.name]
  fused = sum(o.flops for o in done.operations if not o.work.tensor_cores)
  everything = max(done.flops() + fused, step.model_flops)
  share = lambda dtype: done.flops(dtype) / everything if everything else 0.0
  costliest = sorted(done.operations, key=lambda o: -o.seconds)[:COUNT]
  return {
    "mesh": dict(step.trainer.mesh.shape),
    "fits": held.total <= topology.target.memory_bytes,
    "bytes_per_device": held._asdict() | {"total": held.total},
    "memory_bytes": topology.target.memory_bytes,
    "kept_activation_bytes": step.kept_activations,  # From the forward to the backward pass.
    "recomputed_layers": step.trainer.config.memory.recomputed_layers,
    "model_flops": step.model_flops,
    "matrix_flops": everything,
    "tensor_core_flop_share": share(""),
    "bf16_flop_share": share("bf16"),
    "fp8_flop_share": share("f8"),
    "estimate_model": MODEL,
    "estimated_step_seconds": done.seconds,
    "exposed_communication_share": done.exposed / done.seconds,
    "estimated_mfu": step.model_flops / (done.seconds * rates.flops["bf16"]),
    "collectives": [
      {
        "kind": t.collective.kind,
        "axes": t.collective.axes,
        "bytes": t.collective.bytes,
        "trips": t.collective.trips,
        "dynamic": t.collective.dynamic,  # Only in further rounds: not counted.
        "behind_matmuls": t.collective.matmuls,  # Scheduled while it is under way.
        "estimated_seconds": t.seconds,
        "exposed_seconds": t.exposed,
        "hidden": t.exposed <= HIDDEN * t.seconds,
        "module": module_of(t.collective.op_name),
        "name": t.collective.op_name,
      }
      for t in done.transfers
    ],
    "largest_buffers": list(_largest(step.compiled.text))[:COUNT],
    "costliest_operations": [
      {"estimated_seconds": o.seconds, "trips": o.trips, "matrix_flops": o.flops,
       "bytes": o.trips * o.work.bytes, "module": o.module, "name": o.name}
      for o in costliest
    ],
    "module_seconds": by_module(done.operations),
  }  # fmt: skip


def _largest(text: str) -> Iterator[dict[str, Any]]:
  """One of each shape and module."""
  seen = set()
  for b in largest_buffers(text):
    module = module_of(b.op_name)
    if (module, b.shape) not in seen:
      seen.add((module, b.shape))
      yield {"bytes": b.shape.bytes, "dtype": b.shape.dtype, "shape": b.shape.dims,
             "module": module, "name": b.name}  # fmt: skip


def lines(found: dict[str, Any]) -> Iterator[str]:
  """The figures for a person."""
  held = found["bytes_per_device"]
  for part, size in held.items():
    if part != "total":
      yield f"  {part:<12} {size / 1e9:8.2f} GB"
  fits = "fits" if found["fits"] else "DOES NOT FIT"
  limit = found["memory_bytes"] / 1e9
  yield f"  {'total':<12} {held['total'] / 1e9:8.2f} GB of {limit:.2f}: {fits}"
  kept, again = found["kept_activation_bytes"] / 1e9, found["recomputed_layers"]
  yield f"kept for the backward pass: {kept:.2f} GB of activations; layers computed again: {again}"
  yield (
    f"matrix FLOPs: {found['model_flops'] / 1e12:.2f} T of the model, "
    f"{found['matrix_flops'] / 1e12:.2f} T computed; on tensor cores "
    f"{found['tensor_core_flop_share']:.1%}, in bf16 {found['bf16_flop_share']:.1%}, "
    f"in fp8 {found['fp8_flop_share']:.1%}"
  )
  yield f"estimates ({found['estimate_model']}):"
  yield (
    f"  step {found['estimated_step_seconds'] * 1e3:.1f} ms, exposed communication "
    f"{found['exposed_communication_share']:.1%}, MFU {found['estimated_mfu']:.1%}"
  )
  yield from _table("costliest modules, ms:", found["module_seconds"].items())
  yield from _table(
    "costliest operations, ms:",
    (
      (f"{o['module']}: {o['name']}", o["estimated_seconds"]) for o in found["costliest_operations"]
    ),
  )
  yield "largest buffers, GB:"
  for b in found["largest_buffers"]:
    shape = f"{b['dtype']}{list(b['shape'])}"
    yield f"  {b['bytes'] / 1e9:9.3f}  {b['module']}: {shape} {b['name']}"
  yield "collectives, MB a device, estimated ms and those exposed:"
  ran = [c for c in found["collectives"] if not c["dynamic"]]
  for c in sorted(ran, key=lambda c: -c["estimated_seconds"])[:COUNT]:
    moved, axes = c["bytes"] * c["trips"] / 1e6, " and ".join(c["axes"])
    seconds = f"{c['estimated_seconds'] * 1e3:8.3f} {c['exposed_seconds'] * 1e3:8.3f}"
    yield f"  {moved:9.1f} {seconds}  {c['kind']} over {axes}, {c['module']}"


def _table(title: str, rows) -> Iterator[str]:
  yield title
  for name, seconds in list(rows)[:COUNT]:
    yield f"  {seconds * 1e3:9.3f}  {name}"
