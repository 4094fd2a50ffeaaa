"""A feed-forward layer with a matrix of its own for every example."""

from __future__ import annotations

import jax
from einops import rearrange
from flax import nnx

from gemjax.layers.linear import KERNEL, contract
from gemjax.layers.tokens import Tokens
from pallas_kernels import jagged_matmul


class PersonalisedFfn(nnx.Module):
  """Every event of example b times W_b, (E, D): S_b W_b, W_b = reshape(W_0 vec(X_sum_b)), D x D.

  W_0 is born with variance 1 / (I D), I = `inputs` of X_sum: where X_sum has variance 1, W_b has
  variance 1 / D and S W_b that of S. Source: InterFormer (arXiv 2411.09852), PFFN.
  """

  def __init__(self, inputs: int, dim: int, *, dtype: str, rngs: nnx.Rngs):
    born = nnx.initializers.variance_scaling(1 / dim, "fan_in", "truncated_normal", 0, 1)
    self.kernel = nnx.Param(born(rngs.params(), (inputs, dim * dim)), axes=KERNEL)
    self.inputs, self.dim, self.dtype = inputs, dim, dtype

  @jax.named_scope("personalised")
  def __call__(self, x_sum_BI: jax.Array, tokens: Tokens) -> jax.Array:
    flat = contract("bi,io->bo", x_sum_BI, self.kernel[...], self.inputs, self.dtype)
    w_BDD = rearrange(flat, "b (i o) -> b i o", i=self.dim)
    return jagged_matmul(tokens.x_ED.astype(self.dtype), w_BDD, tokens.offsets_B1)
