"""HSTU, the hierarchical sequential transduction unit (Zhai et al. 2024, arXiv 2402.17152, 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.attention import DotProduct, Projection
from gemjax.layers.dropout import Key, dropout
from gemjax.layers.norm import LayerNorm
from gemjax.layers.tokens import Tokens, event_keys


class HstuBlock(nnx.Module):
  """One block, causal; (E, D) -> (E, D).

      U, V, Q, K = split(SiLU(LN(X) W))
      A V        = SiLU(Q Kᵀ + bias(position, time)) V / N      no 1 / sqrt(d)
      Y          = W_o dropout(U * LN(A V)) + X

  Args:
    norm: N, a constant such as the longest length, so that the sum of weights tells how many
      events there were.
  """

  def __init__(
    self,
    config: config_lib.Attention,
    dim: int,
    *,
    dropout: float,
    norm: float,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    self.norm_in = LayerNorm(dim, dtype, rngs)
    self.uvqk = Projection(dim, 4 * dim, dtype=dtype, rngs=rngs)
    self.product = DotProduct(config, dim, own=True, causal=True)
    self.norm_out = LayerNorm(dim, dtype, rngs)
    self.out = Projection(dim, dim, dtype=dtype, rngs=rngs)
    self.dropout, self.norm = dropout, norm

  @jax.named_scope("hstu")
  def __call__(self, tokens: Tokens, key_B: Key = None) -> jax.Array:
    uvqk = jax.nn.silu(self.uvqk(self.norm_in(tokens.x_ED)))
    u_ED, v_ED, q_ED, k_ED = jnp.split(uvqk, 4, axis=1)
    av_ED = self.product(q_ED, k_ED, v_ED, tokens, activation="silu", norm=self.norm)
    gated_ED = dropout(u_ED * self.norm_out(av_ED), self.dropout, event_keys(key_B, tokens))
    return self.out(gated_ED) + tokens.x_ED
