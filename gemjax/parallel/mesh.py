"""The device mesh: `data` x `model`, and the rule that shapes it where the user does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from gemjax import config as config_lib
from gemjax.config import DATA, MODEL

# Of a device's memory, the share that parameters, tables and optimiser state may take by default.
STATE_SHARE = 0.5


def choose_mesh(
  config: config_lib.Mesh,
  devices: int,
  possible: Sequence[int],
  state_bytes: int,
  device_bytes: int | None,
) -> tuple[int, int, str]:
  """(data, model, why). Where one size is 0 it follows from the other; where both are:

  model = the smallest of `possible` with state_bytes / model <= device_bytes / 2,

  so that a small model is replicated on every device and only its gradients travel; the largest
  where even that is too much.

  Args:
    config: The sizes asked for.
    devices: How many there are.
    possible: Sizes of `model` that divide the devices and the tables, ascending, at least one.
    state_bytes: Of parameters, tables and optimiser state, whole.
    device_bytes: Memory of one device; None where it is not known, as on CPUs.

  Raises:
    ConfigError: the sizes are not those of the devices.
  """
  data, model = config.data, config.model
  size = f"{_gigabytes(state_bytes)} of parameters, tables and optimiser state"
  if data or model:
    rest = max(1, devices // (data or model))
    data, model = data or rest, model or rest
    if data * model > devices:
      raise config_lib.ConfigError(
        f"config.mesh is data {data} x model {model} = {data * model} devices, but there are "
        f"{devices}; choose sizes whose product is {devices}"
      )
    return data, model, "as config.mesh says"
  if device_bytes is None:
    model = possible[0]
    return devices // model, model, f"{size}, with little sharing, as a device's memory is unknown"
  enough = [m for m in possible if state_bytes / m <= STATE_SHARE * device_bytes]
  model = enough[0] if enough else possible[-1]
  share = f"{_gigabytes(state_bytes / model)} a device of {_gigabytes(device_bytes)}"
  law = "" if enough else ", which is more than half: it may not fit"
  return devices // model, model, f"{size}, {share}{law}"


def make_mesh(data: int, model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of the first data * model devices, neighbours in one `model` group.

  Raises:
    ConfigError: some devices of other processes would be left out.
  """
  devices = list(jax.devices() if devices is None else devices)
  if data * model < len(devices) and len({d.process_index for d in devices}) > 1:
    raise config_lib.ConfigError(
      f"config.mesh is data {data} x model {model} = {data * model} devices, but the processes "
      f"have {len(devices)}; choose sizes whose product is {len(devices)}"
    )
  grid = np.array(devices[: data * model], dtype=object).reshape(data, model)
  return Mesh(grid, (DATA, MODEL))


def device_memory() -> int | None:
  """Bytes of one accelerator, or None where JAX does not tell."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit")


def _gigabytes(count: float) -> str:
  digits = 0 if count >= 10e9 else 3 - max(0, math.floor(math.log10(max(count, 1e6) / 1e6)))
  return f"{count / 1e9:,.{max(0, digits)}f} GB"
