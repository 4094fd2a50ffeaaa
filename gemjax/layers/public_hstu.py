"""HSTU's block as its authors published it, for checkpoints of generative-recommenders.

Source: research/modeling/sequential/hstu.py of facebookresearch/generative-recommenders.
Letters: E slots for events, D width, H heads, P places, N buckets of time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from gemjax.layers.attention import Projection
from gemjax.layers.dropout import Key, dropout
from gemjax.layers.linear import Linear
from gemjax.layers.norm import normalised
from gemjax.layers.tokens import Tokens, event_keys, recency_E
from pallas_kernels import LinearBuckets, LogBuckets, RelativeBias, jagged_attention

TIMES = 129  # Buckets of time; those from 72 on hold nothing that fits into 32 bits.


class PublicHstuBlock(nnx.Module):
  """One block, causal; (E, D) -> (E, D).

      U, V, Q, K = split(SiLU(norm(X) W))
      A V        = SiLU(Q Kᵀ + bias) V / P
      Y          = W_o dropout(U * norm(A V)) + b_o + X

      bias_te    = position[t - e] + time[floor(ln(max(1, |next_t - time_e|)) / .301)]

  It differs from `HstuBlock` in norms without scale and bias, in b_o, and in biases that all heads
  share, of every distance in events and of the time up to the event after the query, which is
  known when it is asked what that event will be.
  """

  def __init__(
    self, heads: int, dim: int, *, places: int, dropout: float, dtype: str, rngs: nnx.Rngs
  ):
    born = lambda size: nnx.Param(0.02 * jax.random.normal(rngs.params(), (size,)), axes=("width",))
    self.uvqk = Projection(dim, 4 * dim, dtype=dtype, rngs=rngs)
    self.position_P = born(2 * places - 1)  # Of e - t + P - 1; causal blocks read the first P.
    self.time_N = born(TIMES)
    self.out = Linear(dim, dim, dtype=dtype, rngs=rngs)
    self.heads, self.places, self.dropout, self.dtype = heads, places, dropout, dtype

  @jax.named_scope("public_hstu")
  def __call__(self, tokens: Tokens, next_age_E: jax.Array, key_B: Key = None) -> jax.Array:
    uvqk = jax.nn.silu(self.uvqk(normalised(tokens.x_ED, self.dtype)))
    u_ED, v_ED, q_ED, k_ED = jnp.split(uvqk, 4, axis=1)
    q, k, v = (rearrange(x, "e (h d) -> e h d", h=self.heads) for x in (q_ED, k_ED, v_ED))
    shared = lambda table: repeat(table, "n -> h n", h=self.heads)
    place_E = -recency_E(tokens)
    position = shared(self.position_P[: self.places][::-1])
    biases = (
      RelativeBias(position, place_E, place_E, LinearBuckets()),
      RelativeBias(shared(self.time_N[...]), -next_age_E, -tokens.age_E, LogBuckets(0.301)),
    )
    av_EHD = jagged_attention(
      q, k, v, tokens.offsets_B1, activation="silu", norm=self.places, causal=True, biases=biases
    )
    gated_ED = u_ED * normalised(rearrange(av_EHD, "e h d -> e (h d)"), self.dtype)
    return self.out(dropout(gated_ED, self.dropout, event_keys(key_B, tokens))) + tokens.x_ED
