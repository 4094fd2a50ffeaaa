"""Named sets of XLA and NCCL settings for runs on GPUs; none has been measured here.

  default    nothing: what the installed versions choose
  overlap    collectives beside matrix products, also across the turns of loops over layers
  buffers    overlap, and NCCL reads and writes XLA's own buffers: fewer copies, fewer SMs
  zero_cta   overlap, and NCCL moves data with copy engines where it can, leaving SMs to products

A test asks the installed jaxlib for every flag, and the installed NCCL for every variable.
"""

from __future__ import annotations

import os
from typing import NamedTuple

_TIPS = "https://docs.jax.dev/en/latest/gpu_performance_tips.html"
_TOOLBOX = "https://github.com/NVIDIA/JAX-Toolbox/blob/main/rosetta/docs/GPU_performance.md"
_NCCL = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs"


class Setting(NamedTuple):
  """A flag of XLA (`--xla_...`) or a variable of the environment."""

  name: str
  value: str
  reason: str
  source: str


_OVERLAP = (
  Setting(
    "--xla_gpu_enable_latency_hiding_scheduler",
    "true",
    "starts collectives early and awaits them late; off by default",
    _TIPS,
  ),
  Setting(
    "--xla_gpu_enable_pipelined_all_gather",
    "true",
    "gathers the kernels of the next layer in this turn of the scan over layers",
    _TOOLBOX,
  ),
  Setting(
    "--xla_gpu_enable_pipelined_reduce_scatter",
    "true",
    "scatters a layer's gradients in the turn of the next layer",
    _TOOLBOX,
  ),
  Setting(
    "--xla_gpu_experimental_parallel_collective_overlap_limit",
    "4",
    "a collective may start before the one before it is done, so that links wait for no kernel",
    "the help of the flag, and launch/plan.py",
  ),
  Setting(
    "--xla_gpu_experimental_enable_heuristic_collective_combining",
    "false",
    "gradients of kernels are scattered one by one: all of them together wait for the last",
    "the help of the flag, and launch/plan.py",
  ),
  Setting(
    "--xla_gpu_reduce_scatter_combine_threshold_bytes",
    "1048576",
    "the same: only what is below a megabyte is combined",
    "the help of the flag, and launch/plan.py",
  ),
)
PRESETS: dict[str, tuple[Setting, ...]] = {
  "default": (),
  "overlap": _OVERLAP,
  "buffers": (
    *_OVERLAP,
    Setting(
      "--xla_gpu_enable_nccl_user_buffers",
      "true",
      "NCCL registers XLA's buffers, so that it needs no staging copies and fewer SMs",
      f"{_NCCL}/usage/bufferreg.html",
    ),
    Setting(
      "XLA_PYTHON_CLIENT_COLLECTIVE_MEM_SIZE_MB",
      "4096",
      "the pool of those buffers, which XLA demands; more than a step's exchange on 128 GPUs",
      "the help of --xla_gpu_enable_nccl_user_buffers",
    ),
    Setting(
      "NCCL_CTA_POLICY",
      "1",
      "EFFICIENCY: as few thread blocks as reach decent bandwidth, for overlap",
      f"{_NCCL}/api/flags.html",
    ),
  ),
  "zero_cta": (
    *_OVERLAP,
    Setting(
      "--xla_gpu_experimental_enable_nccl_symmetric_buffers",
      "true",
      "registers buffers as symmetric windows, without which NCCL cannot use copy engines",
      f"{_NCCL}/usage/bufferreg.html",
    ),
    Setting(
      "XLA_PYTHON_CLIENT_COLLECTIVE_MEM_SIZE_MB",
      "4096",
      "the pool of those buffers",
      "the help of --xla_gpu_enable_nccl_user_buffers",
    ),
    Setting(
      "NCCL_CTA_POLICY",
      "2",
      "ZERO: no thread block wherever that is possible, at some cost in bandwidth",
      f"{_NCCL}/api/flags.html",
    ),
  ),
}


def environment(preset: str, before: str = "") -> dict[str, str]:
  """Variables by name; XLA's flags follow those of `before`, an XLA_FLAGS that is kept."""
  found = {s.name: s.value for s in PRESETS[preset] if not s.name.startswith("--")}
  flags = [f"{s.name}={s.value}" for s in PRESETS[preset] if s.name.startswith("--")]
  return found | ({"XLA_FLAGS": " ".join(filter(None, [before, *flags]))} if flags else {})


def local_environment(preset: str) -> dict[str, str]:
  """The same, added to the environment of this process."""
  return environment(preset, os.environ.get("XLA_FLAGS", ""))
