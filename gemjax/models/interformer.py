"""InterFormer (Zeng et al. 2024, arXiv 2411.09852): sequences and interactions learn from each
other.

  S_1    = [X_sum | S]                    once: X_sum's tokens lead every sequence (CLS)
  X_sum  = Gating(MLP_n(X))               over units; Gating(X) = act(X * MLP(X))
  S_sum  = Gating([S_CLS | PMA(S) | S_recent])
  X'     = Interaction([X | S_sum])       (n, d) -> (n, d)
  S'     = MHA(PFFN(X_sum, S))            PFFN(X_sum, S) = S W(X_sum), each example's own W (d, d)
  ŷ      = MLP([X_sum | S_sum])           of the last layer

X' and S' both read the layer's inputs, so that the two run side by side.

| choice                                                                    | whose |
|---------------------------------------------------------------------------|-------|
| the formulas above; W(X_sum) is linear                                     | paper |
| one hidden layer in MLP_n, as wide as X has units, and ReLU                | ours  |
| MaskNet, which fuses an event's columns here; rotary positions             | paper |
| ReLU in every MLP, where the paper's settings have Swish                   | ours  |
| Interaction: a Wukong layer and the MLP in it (also: dots, DCNv2, DHEN)    | paper |
| several histories: an arch each, their S_sum stand side by side            | ours  |
| S' = LN(S + MHA(..)): residual and norm, which the formula does not write  | ours  |

Letters: B examples, N units, M summary units, D width, E tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers import tokens as tokens_lib
from gemjax.layers.attention import SelfAttention
from gemjax.layers.dropout import Key, fold
from gemjax.layers.events import EventInput, EventRows, HistorySpec
from gemjax.layers.exchange import SequenceSummary, UnitSummary
from gemjax.layers.gating import Gating
from gemjax.layers.norm import LayerNorm
from gemjax.layers.personalised import PersonalisedFfn
from gemjax.layers.tokens import Tokens
from gemjax.models.heads import Heads
from gemjax.models.wukong import WukongLayer


class SequenceArch(nnx.Module):
  """S' of one history; keeps its tokens."""

  def __init__(self, config: config_lib.InterFormer, dim: int, dtype: str, rngs: nnx.Rngs):
    make = {"dtype": dtype, "rngs": rngs}
    self.personal = PersonalisedFfn(config.cls * dim, dim, **make)
    self.attention = SelfAttention(config.attention, dim, causal=False, **make)
    self.norm = LayerNorm(dim, dtype, rngs)

  def __call__(self, tokens: Tokens, sum_BMD: jax.Array) -> Tokens:
    h_ED = self.personal(rearrange(sum_BMD, "b m d -> b (m d)"), tokens)
    attended_ED = self.attention(tokens._replace(x_ED=h_ED))
    return tokens._replace(x_ED=self.norm(tokens.x_ED + attended_ED))


class Exchange(nnx.Module):
  """(X, sequences) -> (X_sum, S_sum)."""

  def __init__(
    self, config: config_lib.InterFormer, units: int, sequences: int, dim: int, dtype: str, rngs
  ):
    make = {"dtype": dtype, "rngs": rngs}
    self.units = UnitSummary(units, config.cls, dim, gating=config.gating, mlp=True, **make)
    parts = {"first": config.cls, "pma": config.pma, "recent": config.recent}
    self.sequences = nnx.List(
      [SequenceSummary(config.attention, dim, **parts, **make) for _ in range(sequences)]
    )
    self.gate = Gating(config.gating, dim, **make)
    self.outputs = sum(s.units for s in self.sequences)

  def __call__(self, x_BDN: jax.Array, sequences: list[Tokens]) -> tuple[jax.Array, jax.Array]:
    parts = [summary(tokens) for summary, tokens in zip(self.sequences, sequences)]
    return self.units(x_BDN), self.gate(jnp.concatenate(parts, 1))


class InterFormer(nnx.Module):
  """(X0, histories) -> one logit a task; see the module's docstring."""

  def __init__(
    self,
    config: config_lib.InterFormer,
    *,
    units: int,
    dim: int,
    tasks: int,
    histories: tuple[HistorySpec, ...],
    dtype: str,
    rngs: nnx.Rngs,
  ):
    if units < 2:
      raise config_lib.ConfigError(
        f"config.model is InterFormer, whose interactions need two units at least, not {units}"
      )
    count = len(histories)
    self.names = tuple(h.name for h in histories)
    self.events = nnx.List([EventInput(h, dim, dtype=dtype, rngs=rngs) for h in histories])
    exchange = lambda: Exchange(config, units, count, dim, dtype, rngs)
    self.exchanges = nnx.List([exchange() for _ in range(config.layers + 1)])
    # A Wukong layer that keeps the shape: half of the units from products, half compressed.
    layer = config_lib.Wukong(
      fmb_units=units // 2,
      lcb_units=units - units // 2,
      rank=config.rank,
      mlp=config.mlp,
      dropout=config.dropout,
    )
    inputs = units + self.exchanges[0].outputs
    self.interactions = nnx.List(
      [WukongLayer(layer, inputs, dim, dtype, rngs) for _ in range(config.layers)]
    )
    arch = lambda: nnx.List([SequenceArch(config, dim, dtype, rngs) for _ in histories])
    self.archs = nnx.List([arch() for _ in range(config.layers)])
    outputs = (config.cls + self.exchanges[0].outputs) * dim
    self.heads = Heads(outputs, config.head, tasks, config.dropout, dtype, rngs)

  def __call__(
    self, x_BND: jax.Array, histories: dict[str, EventRows], key_B: Key = None
  ) -> jax.Array:
    x_BDN = rearrange(x_BND, "b n d -> b d n")
    lead = tokens_lib.dense(self.exchanges[0].units(x_BDN))
    sequences = [
      tokens_lib.concat(lead, events(histories[name]))
      for name, events in zip(self.names, self.events)
    ]
    layers = zip(self.exchanges, self.interactions, self.archs)
    for i, (exchange, interaction, archs) in enumerate(layers):
      x_sum_BMD, s_sum_BMD = exchange(x_BDN, sequences)
      heard_BDM = rearrange(s_sum_BMD, "b m d -> b d m")
      x_BDN = interaction(jnp.concatenate([x_BDN, heard_BDM], 2), fold(key_B, i))
      sequences = [arch(tokens, x_sum_BMD) for arch, tokens in zip(archs, sequences)]
    summary_BMD = jnp.concatenate(self.exchanges[-1](x_BDN, sequences), 1)
    return self.heads(rearrange(summary_BMD, "b m d -> b (m d)"), fold(key_B, len(self.archs)))
