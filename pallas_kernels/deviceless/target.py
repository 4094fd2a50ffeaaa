"""GPUs that need not be there: what XLA has to know of one to compile for it.

JAX is imported only by `devices`, because what it reads when imported must be in force before.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np

# Options of XLA. There is no device to autotune on. Matrix products go to cuBLAS by name, so that
# they (and `$f8`, the fp8 ones) are seen in the compiled text.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class DevicelessError(ValueError):
  """Nothing can be compiled here, or what the compiler wrote is not understood."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
  """A kind of GPU, in the figures of its vendor's datasheet and of the CUDA programming guide."""

  name: str
  description: str
  major: int  # Compute capability major.0.
  cores: int  # Streaming multiprocessors.
  fpus: int  # float32 lanes of one of them.
  clock_ghz: float
  memory_bytes: int  # As the driver reports it, ECC taken off.
  memory_bytes_per_second: int
  l2_bytes: int
  shared_bytes_per_core: int
  shared_bytes_per_block: int  # The most that a block may ask for.

  @property
  def arch(self) -> str:
    """What PTX calls it; the `a` are instructions that only this generation has."""
    return f"sm_{self.major}0" + ("a" if self.major >= 9 else "")

  def proto(self) -> str:
    """The target as text of XLA's GpuTargetConfigProto."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {self.cores} fpus_per_core: {self.fpus} clock_rate_ghz: {self.clock_ghz}
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_bytes_per_core}
  shared_memory_per_block_optin: {self.shared_bytes_per_block}
  memory_bandwidth: {self.memory_bytes_per_second} l2_cache_size: {self.l2_bytes}
  device_memory_size: {self.memory_bytes}
  cuda_compute_capability {{ major: {self.major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.description}"
"""


_HOPPER = {
  "major": 9,
  "cores": 132,
  "fpus": 128,
  "clock_ghz": 1.98,
  "l2_bytes": 52428800,
  "shared_bytes_per_core": 233472,
  "shared_bytes_per_block": 232448,
}
TARGETS = {
  t.name: t
  for t in (
    Target(
      name="a100",
      description="NVIDIA A100-SXM4-80GB",
      major=8,
      cores=108,
      fpus=64,
      clock_ghz=1.41,
      memory_bytes=85100068864,
      memory_bytes_per_second=2039040000000,
      l2_bytes=41943040,
      shared_bytes_per_core=167936,
      shared_bytes_per_block=166912,
    ),
    Target(
      name="h100",
      description="NVIDIA H100 80GB HBM3",
      memory_bytes=84929347584,
      memory_bytes_per_second=3352320000000,
      **_HOPPER,
    ),
    Target(
      name="h200",
      description="NVIDIA H200 141GB HBM3e",
      memory_bytes=150754820096,
      memory_bytes_per_second=4800000000000,
      **_HOPPER,
    ),
    Target(
      name="b200",
      description="NVIDIA B200",
      major=10,
      cores=148,
      fpus=128,
      clock_ghz=1.965,
      memory_bytes=191514411008,
      memory_bytes_per_second=7672320000000,
      l2_bytes=132644864,
      shared_bytes_per_core=233472,
      shared_bytes_per_block=232448,
    ),
  )
}


def has_cuda_wheels() -> bool:
  """Whether JAX's CUDA plugin is installed; it needs no GPU and no driver to compile."""
  try:
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13))
  except ModuleNotFoundError:
    return False


def check_cuda_wheels() -> None:
  """DevicelessError without the CUDA wheels."""
  if not has_cuda_wheels():
    raise DevicelessError(
      'compiling for GPUs needs the CUDA wheels and no GPU: pip install "gemjax[cuda12]"'
    )


def devices(target: Target, hosts: int = 1, gpus_per_host: int = 1) -> np.ndarray:
  """Abstract devices [hosts, gpus_per_host] to compile for, in the order of their ids.

  XLA reads `AxBxC` as A groups of B processes of C GPUs, and a group is what NVLink joins: so
  hosts are A and GPUs are C. (With the GPUs in the middle each would be a process of its own.)
  DevicelessError without the CUDA wheels. JAX's platforms must be "cpu": else its plugin looks for
  a driver and refuses.
  """
  check_cuda_wheels()
  from jax.experimental import topologies

  found = topologies.get_topology_desc(
    target.name,
    platform="cuda",
    target_config=target.proto(),
    topology=f"{hosts}x1x{gpus_per_host}",
  ).devices
  return np.array(found).reshape(hosts, gpus_per_host)
