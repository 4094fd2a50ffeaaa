"""Attention over event sequences: of events over events, and of few queries over them.

All of it is `pallas_kernels.jagged_attention`: cost follows the events, and an example without
events gives zeros. Letters: B examples, E slots for events, T queries, D width, H heads, M queries
an example, N buckets of a bias.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.linear import KERNEL, contract, kernel_init
from gemjax.layers.tokens import Tokens, recency_E
from pallas_kernels import Buckets, RelativeBias, jagged_attention

# What the buckets of a bias span, in powers of two: 4,096 events, and 2^31 seconds, all of int32.
POSITION_OCTAVES, TIME_OCTAVES = 12, 31


class Projection(nnx.Module):
  """x_TI -> x_TI W, (T, O), without a bias, so that zeros stay zeros; W has variance 1 / I."""

  def __init__(self, inputs: int, outputs: int, *, dtype: str, rngs: nnx.Rngs):
    self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs)), axes=KERNEL)
    self.inputs, self.dtype = inputs, dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    return contract("...i,io->...o", x, self.kernel[...], self.inputs, self.dtype)


class DistanceBias(nnx.Module):
  """table[h, bucket(x_t - x_e)] on every score, born at 0 (T5, arXiv 1910.10683; HSTU).

  The `count` buckets widen by octaves, as many to each as let them span `octaves` of them; what is
  farther shares the last. Where `signed`, keys after the query have a table of their own.
  """

  def __init__(self, heads: int, count: int, octaves: int, *, signed: bool):
    columns = 2 * count if signed else count
    self.table_HN = nnx.Param(jnp.zeros((heads, columns)), axes=("width", "width"))
    # Buckets(bits) needs 1 + octaves * 2^bits columns.
    self.bits = max(0, min(8, ((count - 1) // octaves).bit_length() - 1))
    self.signed = signed

  def __call__(self, x_T: jax.Array, x_E: jax.Array) -> RelativeBias:
    return RelativeBias(self.table_HN[...], x_T, x_E, Buckets(self.bits, self.signed))


class DotProduct(nnx.Module):
  """out_t = sum_e f(s_te) v_e over the events e that t sees: GDPA as a config asks for it.

      s_te = scale q_t.k_e + position bias + time bias,   q and k RMS-normed where qk_norm

  Where queries are the events themselves (`own`), config and `causal` say which keys they see, and
  rope turns both by their positions. Other queries see all events of their example: they stand at
  its time, behind its newest event, and know no order among themselves.

  Raises:
    ValueError: the width does not divide by the heads.
  """

  def __init__(self, config: config_lib.Attention, dim: int, *, own: bool, causal: bool):
    if dim % config.heads:
      raise ValueError(f"attention: width {dim} must divide by the {config.heads} heads")
    gain = lambda: nnx.Param(jnp.ones((dim // config.heads,)), axes=("width",))
    self.gains = nnx.List([gain(), gain()] if config.qk_norm else [])  # Of queries, of keys.
    kinds = ((config.position_buckets, POSITION_OCTAVES), (config.time_buckets, TIME_OCTAVES))
    self.position, self.time = (
      DistanceBias(config.heads, count, octaves, signed=own and not causal) if count else None
      for count, octaves in kinds
    )
    self.heads, self.own, self.causal = config.heads, own, causal
    self.window, self.block, self.rope = config.window, config.block, config.rope

  def __call__(
    self,
    q_TD: jax.Array,
    k_ED: jax.Array,
    v_ED: jax.Array,
    tokens: Tokens,
    q_offsets_B1: jax.Array | None = None,
    **form: Any,
  ) -> jax.Array:
    """out_TD; `form` are the activation and the norm of `jagged_attention`."""
    if self.own:
      form |= {"causal": self.causal, "window": self.window or None, "block": self.block or None}
      form |= {"rope": self.rope or None}
    biases = []
    for bias, back_E in ((self.position, recency_E(tokens)), (self.time, tokens.age_E)):
      if bias is not None:
        biases.append(bias(-back_E if self.own else jnp.zeros(len(q_TD), jnp.int32), -back_E))
    q, k, v = (rearrange(x, "t (h d) -> t h d", h=self.heads) for x in (q_TD, k_ED, v_ED))
    out_THD = jagged_attention(
      q,
      k,
      v,
      tokens.offsets_B1 if self.own else q_offsets_B1,
      tokens.offsets_B1,
      biases=biases,
      qk_norm=tuple(gain[...] for gain in self.gains) or None,
      **form,
    )
    return rearrange(out_THD, "t h d -> t (h d)")


class SelfAttention(nnx.Module):
  """MHA of an example's events over themselves: W_o softmax(Q Kᵀ / sqrt(d)) V, (E, D)."""

  def __init__(
    self, config: config_lib.Attention, dim: int, *, causal: bool, dtype: str, rngs: nnx.Rngs
  ):
    self.qkv = Projection(dim, 3 * dim, dtype=dtype, rngs=rngs)
    self.product = DotProduct(config, dim, own=True, causal=causal)
    self.out = Projection(dim, dim, dtype=dtype, rngs=rngs)

  @jax.named_scope("attention")
  def __call__(self, tokens: Tokens) -> jax.Array:
    q_ED, k_ED, v_ED = jnp.split(self.qkv(tokens.x_ED), 3, axis=1)
    return self.out(self.product(q_ED, k_ED, v_ED, tokens))


class CrossAttention(nnx.Module):
  """MHA of M queries of every example over its events, (B, M, D).

  Of the config it takes heads, QK-norm and biases (see `DotProduct`), not the masks.
  """

  def __init__(self, config: config_lib.Attention, dim: int, *, dtype: str, rngs: nnx.Rngs):
    self.query = Projection(dim, dim, dtype=dtype, rngs=rngs)
    self.kv = Projection(dim, 2 * dim, dtype=dtype, rngs=rngs)
    self.product = DotProduct(config, dim, own=False, causal=False)
    self.out = Projection(dim, dim, dtype=dtype, rngs=rngs)

  @jax.named_scope("cross_attention")
  def __call__(self, q_BMD: jax.Array, tokens: Tokens) -> jax.Array:
    """A batch of one set of queries, (1, M, D), serves all examples."""
    B, M = len(tokens.offsets_B1) - 1, q_BMD.shape[1]
    q_BMD = jnp.broadcast_to(self.query(q_BMD), (B, *q_BMD.shape[1:]))
    k_ED, v_ED = jnp.split(self.kv(tokens.x_ED), 2, axis=1)
    q_TD = rearrange(q_BMD, "b m d -> (b m) d")
    q_offsets_B1 = M * jnp.arange(B + 1, dtype=jnp.int32)
    out_TD = self.product(q_TD, k_ED, v_ED, tokens, q_offsets_B1)
    return rearrange(self.out(out_TD), "(b m) d -> b m d", m=M)


class Pma(nnx.Module):
  """Pooling by multi-head attention: MHA(Q learned, K = S, V = S), (B, M, D).

  Queries of the caller may attend in the same pass, before the seeds: keys are made once.
  Seeds are born N(0, 1), as normed events are, so that scores have variance 1 from the start.
  Source: Set Transformer (arXiv 1810.00825), without its feed-forward part, as in InterFormer.
  """

  def __init__(
    self, config: config_lib.Attention, dim: int, seeds: int, *, dtype: str, rngs: nnx.Rngs
  ):
    born = lambda: jax.random.normal(rngs.params(), (seeds, dim))
    self.seeds_MD = nnx.Param(born(), axes=("width", "width")) if seeds else None
    self.attention = CrossAttention(config, dim, dtype=dtype, rngs=rngs)

  def __call__(self, tokens: Tokens, others_BMD: jax.Array | None = None) -> jax.Array:
    if self.seeds_MD is None:
      return self.attention(others_BMD, tokens)
    seeds_BMD = self.seeds_MD[...][None]
    if others_BMD is None:
      return self.attention(seeds_BMD, tokens)
    seeds_BMD = jnp.broadcast_to(seeds_BMD, (len(others_BMD), *seeds_BMD.shape[1:]))
    seeds_BMD = seeds_BMD.astype(others_BMD.dtype)
    return self.attention(jnp.concatenate([others_BMD, seeds_BMD], 1), tokens)
