"""Which generation of tensor cores a program is traced for."""

from __future__ import annotations

import jax

from pallas_kernels.deviceless.target import TARGETS

HOPPER = 9


def major() -> int:
  """Compute capability of the GPU here, else of the one compiled for (deviceless), else Hopper's.

  From Hopper on four warps multiply as one (wgmma, tcgen05); before, every warp alone (mma).
  """
  if jax.default_backend() == "gpu":
    return int(jax.devices()[0].compute_capability.split(".")[0])
  device = jax.sharding.get_abstract_mesh().abstract_device
  kinds = {target.description: target.major for target in TARGETS.values()}
  return kinds.get(device.device_kind, HOPPER) if device is not None else HOPPER
