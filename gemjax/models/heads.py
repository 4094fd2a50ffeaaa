"""Task heads: one MLP a task on a shared trunk, of all examples or of each domain its own.

Letters: B examples, I inputs, T tasks, K domains.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax.layers.dropout import Key, fold
from gemjax.layers.linear import KERNEL, contract
from gemjax.layers.mlp import Mlp


class Heads(nnx.Module):
  """x_BI -> logits_BT float32, task t by an MLP of its own."""

  def __init__(
    self,
    inputs: int,
    hidden: tuple[int, ...],
    tasks: int,
    dropout: float,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    # Logits of eight bits would tie examples that a ranker must tell apart.
    make = lambda: Mlp(
      inputs, hidden, 1, dtype=dtype, rngs=rngs, dropout=dropout, last_dtype="float32"
    )
    self.heads = nnx.List([make() for _ in range(tasks)])

  def __call__(self, x_BI: jax.Array, key_B: Key = None) -> jax.Array:
    logits = [head(x_BI, fold(key_B, t)) for t, head in enumerate(self.heads)]
    return jnp.concatenate(logits, 1)


class DomainHeads(nnx.Module):
  """Heads of each domain, behind the domain's own gain and bias: Heads_k(x * (1 + a_k) + b_k).

  A domain's parameters learn from its own examples alone, so that those of a value which training
  never saw stay as they were born. All domains' heads are computed and one is taken, so that their
  cost grows with the domains. With no domains it is `Heads`.
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
    make = lambda: Heads(inputs, hidden, tasks, dropout, dtype, rngs)
    self.heads = nnx.List([make() for _ in range(max(1, domains))])
    zeros = lambda: nnx.Param(jnp.zeros((domains, inputs)), axes=KERNEL)
    self.gain_KI = zeros() if domains else None
    self.bias_KI = zeros() if domains else None
    self.domains, self.dtype = domains, dtype

  def __call__(
    self, x_BI: jax.Array, domain_B: jax.Array | None = None, key_B: Key = None
  ) -> jax.Array:
    if not self.domains:
      return self.heads[0](x_BI, key_B)
    one_hot_BK = jax.nn.one_hot(domain_B, self.domains, dtype=self.dtype)
    own = lambda kernel: contract("bk,ki->bi", one_hot_BK, kernel[...], self.domains, self.dtype)
    x_BI = x_BI * (1 + own(self.gain_KI)) + own(self.bias_KI)
    logits_BTK = jnp.stack([heads(x_BI, key_B) for heads in self.heads], 2)
    return jnp.einsum("btk,bk->bt", logits_BTK, one_hot_BK.astype(jnp.float32))
