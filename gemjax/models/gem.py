"""GEM, Meta's generative ads model (engineering.fb.com, 2025-11-10 and 2026-08-03): Wukong's
interactions and pyramids of sequence layers, which learn from each other in every layer.

Published are the parts and what they are for, not their formulas; what is written here is our
design. One layer, i = 1..l, all of whose parts read the layer's inputs and run side by side:

  X_sum = Gating(W X)
  S_sum = Gating([cross(X_sum, S) | PMA(S) | newest tokens], over all branches S)
  A     = attention of X_sum over the memories of X_0 .. X_{i-1}
  X_i   = concat over the width of WukongLayer([X | S_sum | A])
  S_i   = cell(S + LN(S) W(X_sum))     of every branch; cell: a transformer or an HSTU block
  memory of X_i = LN(C X_i), some units

  ŷ = MLP([X_l | S_sum])               of the example's domain, behind the domain's own norm

Pyramid: every history is read by branches of several strides side by side. The branch of stride 1
has all events, which attend inside blocks of 64: O(T). A branch of stride s has the means of s
neighbours, which attend over all before them: O((T / s)^2). The full sequence lives on from layer
to layer (GEM's post).

| choice                                                                        | whose       |
|-------------------------------------------------------------------------------|-------------|
| stackable factorization machines in depth and width, attention across layers  | GEM         |
| its formula: queries X_sum, keys from compressed outputs of all layers before | ours        |
| pyramid-parallel sequence modules                                             | GEM         |
| strides, means, one cell a branch and layer                                   | ours        |
| blocks of 64, QK-norm, rotary positions, PMA, cross attention                 | GEM         |
| X_sum, S_sum, personalised W                                                  | InterFormer |
| several domains over one trunk                                                | GEM         |
| a norm and heads of a domain's own                                            | ours        |
| layers 2..l in one scan: compile time independent of l                        | ours        |

Letters: B examples, N units, M summary units, D width, E tokens, L memories, K units of one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers import tokens as tokens_lib
from gemjax.layers.dropout import Key, fold
from gemjax.layers.events import EventInput, EventRows, HistorySpec
from gemjax.layers.exchange import SequenceSummary, UnitSummary
from gemjax.layers.gating import Gating
from gemjax.layers.hstu import HstuBlock
from gemjax.layers.interaction import UnitLinear
from gemjax.layers.memory import LayerMemory
from gemjax.layers.norm import layer_norm
from gemjax.layers.personalised import PersonalisedFfn
from gemjax.layers.tokens import Tokens
from gemjax.layers.transformer import TransformerBlock
from gemjax.models.heads import DomainHeads
from gemjax.models.wukong import STACKED, WukongLayer


class Branch(NamedTuple):
  """Static: one history at one resolution."""

  history: str
  stride: int
  length: int  # Most tokens of an example.


class State(NamedTuple):
  """What a layer hands to the next."""

  x_BND: jax.Array
  x_ED: tuple[jax.Array, ...]  # Of every branch.
  memory_BLKD: jax.Array


class BranchLayer(nnx.Module):
  """One layer of one branch: S -> cell(S + LN(S) W(X_sum))."""

  def __init__(self, config: config_lib.Gem, branch: Branch, dim: int, dtype: str, rngs: nnx.Rngs):
    make = {"dtype": dtype, "rngs": rngs}
    attention = config.fine if branch.stride == 1 else config.coarse
    personal = config.personalised and config.exchange
    self.norm = layer_norm(dim, dtype, rngs) if personal else None
    self.personal = PersonalisedFfn(config.cls * dim, dim, **make) if personal else None
    make |= {"dropout": config.dropout}
    if config.cell == "hstu":
      self.cell = HstuBlock(attention, dim, norm=branch.length, **make)
    else:
      self.cell = TransformerBlock(attention, dim, causal=True, hidden=2 * dim, **make)

  def __call__(self, tokens: Tokens, sum_BMD: jax.Array, key_B: Key) -> jax.Array:
    if self.personal is not None:
      normed = tokens._replace(x_ED=self.norm(tokens.x_ED))
      own_ED = self.personal(rearrange(sum_BMD, "b m d -> b (m d)"), normed)
      tokens = tokens._replace(x_ED=tokens.x_ED + own_ED)
    return self.cell(tokens, key_B)


class Summaries(nnx.Module):
  """(X, branches) -> (X_sum, S_sum); `outputs` counts the units of S_sum."""

  def __init__(
    self, config: config_lib.Gem, units: int, branches: list[Branch], dim: int, dtype: str, rngs
  ):
    make = {"dtype": dtype, "rngs": rngs}
    self.units = UnitSummary(units, config.cls, dim, config.gating, **make)
    cross = config.cls if config.cross else 0
    summary = lambda b: SequenceSummary(
      config.coarse, dim, cross=cross, pma=config.pma,
      recent=config.recent if b.stride == 1 else 0, **make,
    )  # fmt: skip
    self.sequences = nnx.List([summary(b) for b in branches])
    self.gate = Gating(config.gating, dim, **make) if branches else None
    self.outputs = sum(s.units for s in self.sequences)

  def __call__(self, x_BND: jax.Array, branches: list[Tokens]) -> tuple[jax.Array, jax.Array]:
    x_sum_BMD = self.units(x_BND)
    parts = [summary(s, x_sum_BMD) for summary, s in zip(self.sequences, branches)]
    if not parts:
      return x_sum_BMD, x_BND[:, :0]
    return x_sum_BMD, self.gate(jnp.concatenate(parts, 1))


class GemLayer(nnx.Module):
  """One layer; see the module's docstring. The first one reads another number of units."""

  def __init__(
    self, config: config_lib.Gem, units: int, branches: list[Branch], dim: int, dtype: str, rngs
  ):
    told = branches if config.exchange else []
    self.summaries = Summaries(config, units, told, dim, dtype, rngs)
    inputs, outputs = units + self.summaries.outputs, config.fmb_units + config.lcb_units
    remember = lambda: LayerMemory(outputs, config.memory_units, dim, dtype=dtype, rngs=rngs)
    self.memory = remember() if config.memory_units else None
    inputs += config.cls if config.memory_units else 0
    block = dataclasses.replace(
      config,
      fmb_units=config.fmb_units // config.width,
      lcb_units=config.lcb_units // config.width,
    )
    self.blocks = nnx.List(
      [WukongLayer(block, inputs, dim, dtype, rngs) for _ in range(config.width)]
    )
    self.branches = nnx.List([BranchLayer(config, b, dim, dtype, rngs) for b in branches])

  def __call__(self, state: State, branches: list[Tokens], index, key_B: Key) -> State:
    """`index` memories are written."""
    sequences = [b._replace(x_ED=x_ED) for b, x_ED in zip(branches, state.x_ED)]
    told = sequences if len(self.summaries.sequences) else []
    x_sum_BMD, s_sum_BMD = self.summaries(state.x_BND, told)
    inputs = [state.x_BND, s_sum_BMD]
    if self.memory is not None:
      inputs.append(self.memory.read(x_sum_BMD, state.memory_BLKD, index))
    input_BND = jnp.concatenate(inputs, 1)
    key = lambda part: fold(key_B, part)
    x_BND = jnp.concatenate([block(input_BND, key(w)) for w, block in enumerate(self.blocks)], 1)
    x_ED = tuple(
      layer(tokens, x_sum_BMD, key(100 + b))
      for b, (layer, tokens) in enumerate(zip(self.branches, sequences))
    )
    memory_BLKD = state.memory_BLKD
    if self.memory is not None:
      memory_BLKD = self.memory.write(x_BND, memory_BLKD, index)
    return State(x_BND, x_ED, memory_BLKD)


class Gem(nnx.Module):
  """(X0, histories, domain) -> one logit a task; see the module's docstring."""

  def __init__(
    self,
    config: config_lib.Gem,
    *,
    units: int,
    dim: int,
    tasks: int,
    histories: tuple[HistorySpec, ...],
    domains: int,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    outputs = config.fmb_units + config.lcb_units
    towers = histories if config.strides else ()
    self.events = nnx.List([EventInput(h, dim, dtype=dtype, rngs=rngs) for h in towers])
    self.branches = tuple(
      Branch(h.name, stride, -(-h.length // stride)) for h in towers for stride in config.strides
    )
    make = lambda units, rngs: GemLayer(config, units, self.branches, dim, dtype, rngs)
    self.first, self.depth = make(units, rngs), config.layers - 1
    stack = nnx.split_rngs(splits=max(1, self.depth))(
      nnx.vmap(lambda rngs: make(outputs, rngs), transform_metadata=STACKED)
    )
    self.layers = stack(rngs) if self.depth else None
    remember = lambda: UnitLinear(units, config.memory_units, dtype=dtype, rngs=rngs)
    self.memory = remember() if config.memory_units else None
    self.summaries = Summaries(config, outputs, self.branches, dim, dtype, rngs)
    inputs = (outputs + self.summaries.outputs) * dim
    self.heads = DomainHeads(inputs, config.head, tasks, domains, config.dropout, dtype, rngs)
    self.memory_units, self.layer_count = config.memory_units, config.layers

  def __call__(
    self,
    x_BND: jax.Array,
    histories: dict[str, EventRows],
    key_B: Key = None,
    domain_B: jax.Array | None = None,
  ) -> jax.Array:
    branches = self._branches(histories)
    B, _, D = x_BND.shape
    memory_BLKD = jnp.zeros((B, self.layer_count + 1, self.memory_units, D), x_BND.dtype)
    if self.memory is not None:
      memory_BLKD = memory_BLKD.at[:, 0].set(self.memory(x_BND))
    state = State(x_BND, tuple(b.x_ED for b in branches), memory_BLKD)
    state = self.first(state, branches, 1, fold(key_B, 0))
    if self.layers is not None:
      graph, weights = nnx.split(self.layers)

      def layer(state, at):
        weights, index = at
        key = fold(fold(key_B, 1), index)
        return nnx.merge(graph, weights)(state, branches, index + 2, key), None

      state, _ = jax.lax.scan(layer, state, (weights, jnp.arange(self.depth)))
    sequences = [b._replace(x_ED=x_ED) for b, x_ED in zip(branches, state.x_ED)]
    _, s_sum_BMD = self.summaries(state.x_BND, sequences)
    units_BND = jnp.concatenate([state.x_BND, s_sum_BMD], 1)
    return self.heads(rearrange(units_BND, "b n d -> b (n d)"), domain_B, fold(key_B, 2))

  def _branches(self, histories: dict[str, EventRows]) -> list[Tokens]:
    tokens = {}
    for events, name in zip(self.events, dict.fromkeys(b.history for b in self.branches)):
      tokens[name] = events(histories[name])
    out = []
    for name, stride, _ in self.branches:
      out.append(tokens[name] if stride == 1 else tokens_lib.coarsen(tokens[name], stride))
    return out
