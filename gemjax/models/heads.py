"""Task heads: one MLP a task on a shared trunk, the same for all examples or bent by domains.

Letters: B examples, I inputs, H inputs of the last layer, T tasks, K domains.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax.layers.dropout import Key, fold
from gemjax.layers.linear import KERNEL, contract
from gemjax.layers.mlp import Mlp


class Heads(nnx.Module):
  """x_BI -> logits_BT float32, task t by an MLP of its own, whose inputs lie as `outer` says
  (gemjax/layers/linear.py).
  """

  def __init__(
    self,
    inputs: int,
    hidden: tuple[int, ...],
    tasks: int,
    dropout: float,
    dtype: str,
    rngs: nnx.Rngs,
    norm: Callable[[int], nnx.Module] | None = None,
    outer: int = 0,
  ):
    # Logits of eight bits would tie examples that a ranker must tell apart.
    make = lambda: Mlp(
      inputs,
      hidden,
      1,
      dtype=dtype,
      rngs=rngs,
      dropout=dropout,
      last_dtype="float32",
      norm=norm,
    )
    self.heads, self.outer = nnx.List([make() for _ in range(tasks)]), outer

  @jax.named_scope("heads")
  def __call__(self, x_BI: jax.Array, key_B: Key = None) -> jax.Array:
    return self.logits(self.hidden(x_BI, key_B))

  def hidden(self, x_BI: jax.Array, key_B: Key = None) -> list[jax.Array]:
    """(B, H) of each task: what its last layer reads."""
    key = lambda t: fold(key_B, t)
    return [head.hidden(x_BI, key(t), self.outer) for t, head in enumerate(self.heads)]

  def logits(self, hidden: list[jax.Array]) -> jax.Array:
    """logits_BT of `hidden`."""
    lie = lambda head: self.outer if len(head.layers) == 1 else 0
    last = [head.layers[-1](h_BH, lie(head)) for head, h_BH in zip(self.heads, hidden)]
    return jnp.concatenate(last, 1)


class DomainHeads(nnx.Module):
  """Heads that every domain bends to its own: ŷ_t = (w_t + w_kt) · h_t + c_t + c_kt, with
  h_t = hidden_t(x * (1 + a_k) + b_k) for an example of domain k.

  w_k, c_k, a_k and b_k are born at zero and learn from the domain's examples alone: a domain that
  training never saw has the heads of all. Cost does not grow with the domains. With none it is
  `Heads`.

  After STAR (Sheng et al. 2021, arXiv 2101.11427): its partitioned norm and shared weights; there
  every domain multiplies all weights by its own, here it changes inputs and the last layer.
  """

  def __init__(
    self,
    inputs: int,
    hidden: tuple[int, ...],
    tasks: int,
    domains: int,
    dropout: float,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    self.heads = Heads(inputs, hidden, tasks, dropout, dtype, rngs)
    zeros = lambda width: nnx.Param(jnp.zeros((domains, width)), axes=KERNEL)
    last = hidden[-1] if hidden else inputs
    self.gain_KI = zeros(inputs) if domains else None
    self.shift_KI = zeros(inputs) if domains else None
    self.weights_KH = nnx.List([zeros(last) for _ in range(tasks)] if domains else [])
    self.bias_KT = zeros(tasks) if domains else None
    self.domains, self.dtype = domains, dtype

  @jax.named_scope("heads")
  def __call__(
    self, x_BI: jax.Array, domain_B: jax.Array | None = None, key_B: Key = None
  ) -> jax.Array:
    if not self.domains:
      return self.heads(x_BI, key_B)
    one_hot_BK = jax.nn.one_hot(domain_B, self.domains)
    own = lambda rows_KX, dtype="float32": contract(
      "bk,kx->bx", one_hot_BK, rows_KX[...], self.domains, dtype
    )
    x_BI = x_BI * (1 + own(self.gain_KI, self.dtype)) + own(self.shift_KI, self.dtype)
    hidden = self.heads.hidden(x_BI, key_B)
    bend = [jnp.vecdot(h_BH, own(w_KH)) for h_BH, w_KH in zip(hidden, self.weights_KH)]
    return self.heads.logits(hidden) + jnp.stack(bend, 1) + own(self.bias_KT)
