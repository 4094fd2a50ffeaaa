"""What an instruction of a compiled program does: matrix FLOPs by type, and bytes of memory."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from gemjax.plan import hlo
from gemjax.plan.target import PlanError

# They make no kernel: names, and control, whose inside is counted.
FREE = hlo.NAMES | {"call", "conditional", "while"}
_READ_IN_PART = {"gather", "dynamic-slice", "slice"}
_WRITTEN_IN_PART = {"scatter", "dynamic-update-slice"}
SORT_PASSES = 8  # A radix sort of 32 to 64 bits reads and writes its keys about so often.
_PALLAS = {"__gpu$xla.gpu.triton": "pallas", "mosaic_gpu_v2": "jagged_attention"}  # Unnamed ones.
_MULTIPLY = ("jagged_attention", "jagged_matmul", "fm_interaction")  # Ops whose kernels do.


class Work(NamedTuple):
  """Of one execution on one device."""

  flops: int  # Matrix products alone: 2 M N K.
  dtype: str  # Of their operands, "" without.
  tensor_cores: bool  # Whether the product is one of cuBLAS, not of a fusion.
  bytes: int  # Read from and written to the device's memory.


def work(module: hlo.Module, computation: hlo.Computation, ins: hlo.Instruction) -> Work:
  """Work of an instruction that is neither control nor a collective."""
  if ins.opcode in FREE or re.search(r"-(start|update|done)$", ins.opcode):
    return Work(0, "", False, 0)
  if ins.opcode == "fusion":
    inside = module.computations[ins.called("calls")[0]]
    products = [_product(inside, i) for i in inside.instructions if i.opcode == "dot"]
    dtype = products[0][1] if products else ""
    return Work(sum(f for f, _ in products), dtype, False, _fused_bytes(inside))
  flops, dtype = _product(computation, ins)
  cublas = ins.opcode == "custom-call"
  return Work(flops, dtype, bool(flops) and cublas, _bytes(computation, ins))


def kernel_name(ins: hlo.Instruction) -> str | None:
  """The name that `pallas_call` was given, or None for all other instructions. A Mosaic kernel's
  program does not tell it, and there are those of attention alone.
  """
  unnamed = next((name for t, name in _PALLAS.items() if f'"{t}"' in ins.attributes), None)
  if ins.opcode != "custom-call" or not unnamed:
    return None
  found = re.search(r'name = \\?"(\w+)', ins.attributes)
  return found[1] if found else unnamed


def multiplies(ins: hlo.Instruction) -> bool:
  """Whether it is a Pallas kernel with matrix products."""
  return (kernel_name(ins) or "").startswith(_MULTIPLY)


def _product(computation: hlo.Computation, ins: hlo.Instruction) -> tuple[int, str]:
  """(2 M N K, type of the operands) of a product, else (0, "")."""
  if ins.opcode == "dot":
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", ins.attributes)
  elif ins.opcode == "custom-call" and "__cublas$" in ins.attributes:
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', ins.attributes)
  else:
    return 0, ""
  if not found:
    raise PlanError(f"the product {ins.name} does not say over which axis it sums")
  left = computation.named()[ins.operands[0]].shapes[0]
  summed = math.prod(left.dims[int(axis)] for axis in re.findall(r"\d+", found[1]))
  return 2 * math.prod(ins.shapes[0].dims) * summed, left.dtype


def _bytes(computation: hlo.Computation, ins: hlo.Instruction) -> int:
  named = computation.named()
  # What our kernels write in place they touch a part of, which only data tell.
  in_part = ins.aliases if kernel_name(ins) else {}
  operands = [name for i, name in enumerate(ins.operands) if i not in in_part.values()]
  shapes = [shape for i, shape in enumerate(ins.shapes) if i not in in_part]
  read = [s.bytes for name in operands for s in named[name].shapes]
  # cuBLAS' workspace is no traffic.
  written = [s.bytes for s in shapes if not ("__cublas$" in ins.attributes and s.dtype == "s8")]
  if ins.opcode in _READ_IN_PART:
    return 2 * sum(written) + sum(read[1:])
  if ins.opcode in _WRITTEN_IN_PART:
    return _updated(computation, ins) + sum(read[1:])
  passes = SORT_PASSES if ins.opcode == "sort" else 1
  return passes * (sum(read) + sum(written))


def _fused_bytes(inside: hlo.Computation) -> int:
  """Parameters, but of one that is only looked up in or updated in place the part; and the root."""
  named, users = inside.named(), {}
  for ins in inside.instructions:
    for operand in ins.operands:
      users.setdefault(operand, []).append(ins)
  total = 0
  for ins in inside.instructions:
    if ins.opcode == "parameter":
      total += _read(inside, ins, users)
  root = inside.root
  for leaf in root.operands if root.opcode == "tuple" else (root.name,):
    ins = named[leaf]
    while ins.opcode == "bitcast":
      ins = named[ins.operands[0]]
    in_part = ins.opcode in _WRITTEN_IN_PART
    total += _updated(inside, ins) if in_part else sum(s.bytes for s in ins.shapes)
  return total


def _read(inside: hlo.Computation, ins: hlo.Instruction, users) -> int:
  whole = sum(s.bytes for s in ins.shapes)
  part = 0
  for user in users.get(ins.name, []):
    first = user.operands[0] == ins.name
    if user.opcode == "bitcast":
      part += _read(inside, user, users)
    elif first and user.opcode in _READ_IN_PART:
      part += sum(s.bytes for s in user.shapes)
    elif not (first and user.opcode in _WRITTEN_IN_PART):
      return whole
  return min(whole, part)


def _updated(computation: hlo.Computation, ins: hlo.Instruction) -> int:
  """Of the rows that a scatter or dynamic-update-slice writes."""
  update = ins.operands[-1 if ins.opcode == "scatter" else 1]
  return sum(s.bytes for s in computation.named()[update].shapes)
