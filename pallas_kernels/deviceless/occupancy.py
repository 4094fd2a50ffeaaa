"""How much of a streaming multiprocessor a kernel can fill, by the rules of NVIDIA's calculator."""

from __future__ import annotations

from pallas_kernels.deviceless.target import Target

# Equal on sm_80, sm_90 and sm_100 (CUDA programming guide, "Technical Specifications").
WARPS, BLOCKS, REGISTERS = 64, 32, 65_536  # Of a multiprocessor.
REGISTER_UNIT = 256  # Registers are given to a warp in units of this,
WARP_UNIT = 4  # and to warps in fours, one for each of its schedulers.
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # Bytes of a block; CUDA keeps the second for itself.
TENSOR_COLUMNS = 512  # Of tensor memory, on sm_100.


def occupancy_bound(
  target: Target, *, registers: int, shared_bytes: int, threads: int, tensor_columns: int = 0
) -> float:
  """The largest share of a multiprocessor's 64 warps that can be resident at once.

      blocks * warps of a block / 64,
      blocks = the most that registers, shared memory, warps, blocks and tensor memory allow

  A bound: a grid too small to fill the GPU stays below it. 0 where not one block fits.

  Args:
    target: The GPU.
    registers: Of a thread, 1 or more.
    shared_bytes: Of a block, static and dynamic.
    threads: Of a block, 1 or more.
    tensor_columns: Of tensor memory, of a block.
  """
  warps = -(-threads // 32)
  registers_of_warp = _round_up(32 * registers, REGISTER_UNIT)
  fed_warps = REGISTERS // registers_of_warp // WARP_UNIT * WARP_UNIT
  shared = _round_up(shared_bytes + SHARED_RESERVED, SHARED_UNIT)
  limits = [BLOCKS, WARPS // warps, fed_warps // warps, target.shared_bytes_per_core // shared]
  if tensor_columns:
    limits.append(TENSOR_COLUMNS // tensor_columns)
  return min(limits) * warps / WARPS


def _round_up(value: int, unit: int) -> int:
  return -(-value // unit) * unit
