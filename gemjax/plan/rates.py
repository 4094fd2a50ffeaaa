"""What GPUs and their links can do at most, from datasheets; dense, not sparse, rates. And what
share of it a step has: one H100 80GB HBM3, power-limited as it comes, made large products at 851 of
989 TFLOP/s and moved 2.92 of 3.35 TB/s in the steps of `wukong_paper` and `gem_large` (WORKSPACE).
That links and other GPUs reach as much of theirs is assumed.
"""

from __future__ import annotations

from typing import NamedTuple

from gemjax.plan.collectives import Collective

REACHED = 0.87
KERNEL_SECONDS = 2e-6  # Of a kernel beside its work: the median of 2,100 small ones, 1.7.
NVLINK_SECONDS, NETWORK_SECONDS = 10e-6, 30e-6  # Of a collective beside its bytes; ours.


class Rates(NamedTuple):
  """Of one GPU. Bytes/s of a link are in one direction."""

  flops: dict[str, float]  # Matrix FLOP/s by the type of the operands.
  memory: float
  nvlink: float
  network: float  # Its own network card, as in a DGX.
  reached: float = REACHED


def _flops(tf32: float, bf16: float, fp8: float) -> dict[str, float]:
  return {"f32": tf32, "bf16": bf16, "f16": bf16, "f8e4m3fn": fp8, "f8e5m2": fp8}


_HOPPER = {"flops": _flops(494.7e12, 989.4e12, 1978.9e12), "nvlink": 450e9, "network": 50e9}
RATES = {
  # Without fp8 units: such operands are multiplied as bfloat16.
  "a100": Rates(_flops(156e12, 312e12, 312e12), 2.039e12, 300e9, 25e9),
  "h100": Rates(memory=3.352e12, **_HOPPER),
  "h200": Rates(memory=4.8e12, **_HOPPER),
  "b200": Rates(_flops(1125e12, 2250e12, 4500e12), 7.672e12, 900e9, 50e9),
}


def link_seconds(collective: Collective, rates: Rates, gpus_per_host: int) -> float:
  """Seconds of one execution, alone on the links: the slower of NVLink and network, and a latency.

  A device receives `collective.bytes` over NVLink. Of these (n - g) / (n - 1) come from other
  hosts, where g of a group's n devices lie on one: each device's own in an exchange, the same for
  all g otherwise, so that they enter once, through g network cards.
  """
  if collective.kind == "collective-permute":
    crosses = any(a // gpus_per_host != b // gpus_per_host for a, b in collective.groups)
    near, n = (1, 2) if crosses else (2, 2)
  else:
    group = max(collective.groups, key=len)
    hosts = [device // gpus_per_host for device in group]
    near, n = max(hosts.count(h) for h in hosts), len(group)
  if n == 1 or not collective.bytes:
    return 0.0
  if near == n:
    return NVLINK_SECONDS + collective.bytes / rates.nvlink / rates.reached
  remote = collective.bytes * (n - near) / (n - 1)
  shared = 1 if "all-to-all" in collective.kind else near
  inside = collective.bytes / rates.nvlink if near > 1 else 0.0
  return NETWORK_SECONDS + max(inside, remote / shared / rates.network) / rates.reached
