"""Optimisers of table rows: each sees only the rows that a batch looked up.

All take the gradient after the duplicates of a batch were summed, in float32, and return the step
to subtract. `accumulated` is c, by how much a sum of squares grows too fast (see `average` in
gemjax/embedding/sharded.py); 1 but there. Letters: M looked-up rows, R rows of the stack, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Slots = dict[str, jax.Array]  # One array a slot, first axis R (stored) or M (gathered).


@dataclasses.dataclass(frozen=True, slots=True)
class RowOptimizer:
  """Three pure functions.

  init(rows, width) -> slots
  step(grad_MW, slots, lr) -> (delta_MW, slots)
  scale(slots) -> what a gradient is multiplied with before lr, broadcastable to (M, W)
  """

  init: Callable[[int, int], Slots]
  step: Callable[[jax.Array, Slots, jax.Array], tuple[jax.Array, Slots]]
  scale: Callable[[Slots], jax.Array]


def rowwise_adagrad(
  eps: float = 1e-8, accumulated: int = 1, axis: str | None = None
) -> RowOptimizer:
  """AdaGrad with one accumulator a row: v += mean_w(g^2); delta = lr g / (sqrt(v / c) + eps).

  Where `axis` is given, a device of it holds an equal share of the row's W columns.

  Source: FBGEMM's EXACT_ROWWISE_ADAGRAD; the optimiser of the Wukong paper (section 4).
  """

  def step(grad_MW, slots, lr):
    square_M = jnp.mean(jnp.square(grad_MW), axis=1)
    v_M = slots["v"] + (jax.lax.pmean(square_M, axis) if axis else square_M)
    return lr * grad_MW * scale({"v": v_M}), {"v": v_M}

  scale = lambda slots: 1 / (jnp.sqrt(slots["v"] / accumulated)[:, None] + eps)
  return RowOptimizer(lambda rows, width: {"v": jnp.zeros((rows,))}, step, scale)


def adagrad(eps: float = 1e-8, accumulated: int = 1, axis: str | None = None) -> RowOptimizer:
  """AdaGrad (Duchi et al. 2011): v += g^2; delta = lr g / (sqrt(v / c) + eps), one v a weight."""
  del axis  # Columns do not meet.

  def step(grad_MW, slots, lr):
    v_MW = slots["v"] + jnp.square(grad_MW)
    return lr * grad_MW * scale({"v": v_MW}), {"v": v_MW}

  scale = lambda slots: 1 / (jnp.sqrt(slots["v"] / accumulated) + eps)
  return RowOptimizer(lambda rows, width: {"v": jnp.zeros((rows, width))}, step, scale)


def sgd(eps: float = 0.0, accumulated: int = 1, axis: str | None = None) -> RowOptimizer:
  """delta = lr g; nothing is accumulated."""
  del eps, accumulated, axis
  step = lambda grad_MW, slots, lr: (lr * grad_MW, {})
  return RowOptimizer(lambda rows, width: {}, step, lambda slots: jnp.ones(()))


def lazy_adam(
  eps: float = 1e-8,
  accumulated: int = 1,
  axis: str | None = None,
  b1: float = 0.9,
  b2: float = 0.999,
) -> RowOptimizer:
  """Adam whose moments move only where a row was looked up.

  m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, n += 1,
  delta = lr (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps)

  with n the row's own number of look-ups, so that a rare row's first step is as long as a frequent
  one's (a global n would leave its moments biased towards zero: tensorflow#23668).
  """
  del accumulated, axis  # v is a mean and not a sum, and columns do not meet.

  def init(rows, width):
    moments = {name: jnp.zeros((rows, width)) for name in ("m", "v")}
    return moments | {"n": jnp.zeros((rows,))}

  def step(grad_MW, slots, lr):
    new = {
      "m": b1 * slots["m"] + (1 - b1) * grad_MW,
      "v": b2 * slots["v"] + (1 - b2) * jnp.square(grad_MW),
      # A finite gradient counts; so that n, too, comes from the gradient (StackRule.write).
      "n": slots["n"] + jnp.isfinite(grad_MW[:, 0]),
    }
    return lr * (new["m"] / unbiased(b1, new["n"])) * scale(new), new

  def scale(slots):
    # A row that was never looked up has n = 0 and v = 0: as if n were 1.
    n_M = jnp.maximum(slots["n"], 1)
    return 1 / (jnp.sqrt(slots["v"] / unbiased(b2, n_M)) + eps)

  def unbiased(b, n_M):
    # 1 - b^n by expm1: in float32 1 - 0.999^1 would keep only four digits.
    return -jnp.expm1(n_M * jnp.log(b))[:, None]

  return RowOptimizer(init, step, scale)


ROW_OPTIMIZERS = {
  "rowwise_adagrad": rowwise_adagrad,
  "adagrad": adagrad,
  "sgd": sgd,
  "lazy_adam": lazy_adam,
}
