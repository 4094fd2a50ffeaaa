"""Which generation of tensor cores a program is traced for."""

from __future__ import annotations

import jax

from pallas_kernels.deviceless.target import TARGETS

HOPPER = 9  # Four warps multiply as one (wgmma); before, every warp alone (mma).


def target() -> int | None:
  """Major compute capability of the GPU here, else of the one compiled for; None without either."""
  if jax.default_backend() == "gpu":
    major = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")[0]
    return int(major) if major.isdigit() else None
  device = jax.sharding.get_abstract_mesh().abstract_device
  kinds = {t.description: t.major for t in TARGETS.values()}
  return None if device is None else kinds.get(device.device_kind)
