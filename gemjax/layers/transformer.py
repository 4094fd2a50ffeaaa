"""The transformer block over event sequences."""

from __future__ import annotations

import jax
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.attention import SelfAttention
from gemjax.layers.dropout import Key, dropout, fold
from gemjax.layers.mlp import Mlp
from gemjax.layers.norm import LayerNorm
from gemjax.layers.tokens import Tokens, event_keys


class TransformerBlock(nnx.Module):
  """One block, norms first; (E, D) -> (E, D).

      X <- X + dropout(MHA(LN(X)))
      X <- X + dropout(W_2 dropout(relu(W_1 LN(X))))

  Source: SASRec (arXiv 1808.09781) where causal; norms as in arXiv 2002.04745.
  """

  def __init__(
    self,
    config: config_lib.Attention,
    dim: int,
    *,
    causal: bool,
    hidden: int,
    dropout: float,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    self.norm_attention = LayerNorm(dim, dtype, rngs)
    self.attention = SelfAttention(config, dim, causal=causal, dtype=dtype, rngs=rngs)
    self.norm_mlp = LayerNorm(dim, dtype, rngs)
    self.mlp = Mlp(dim, (hidden,), dim, dtype=dtype, rngs=rngs, dropout=dropout)
    self.dropout = dropout

  @jax.named_scope("transformer")
  def __call__(self, tokens: Tokens, key_B: Key = None) -> jax.Array:
    key_E, x_ED = event_keys(key_B, tokens), tokens.x_ED
    attended_ED = self.attention(tokens._replace(x_ED=self.norm_attention(x_ED)))
    x_ED = x_ED + dropout(attended_ED, self.dropout, fold(key_E, 0))
    mlp_ED = self.mlp(self.norm_mlp(x_ED), fold(key_E, 1))
    return x_ED + dropout(mlp_ED, self.dropout, fold(key_E, 2))
