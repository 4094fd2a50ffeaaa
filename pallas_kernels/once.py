"""What XLA for CPUs shall compute once, where it would for every reader."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def computed_once(f: Callable) -> Callable:
  """f of arrays, element-wise, a reduction or a gather, which XLA for CPUs shall compute once and
  as it stands: not joined to what makes its arguments, nor to what reads its result, for each of
  which it would compute it anew. Nor is a call within f joined, such as `jnp.where` is.
  """

  def called(*args):
    with set_xla_metadata(inlineable="false"):
      return jax.jit(f)(*args)

  return lambda *args: jax.lax.platform_dependent(*args, cpu=called, default=f)
