"""GEM, Meta's generative ads model (engineering.fb.com, 2025-11-10 and 2026-08-03): Wukong's
interactions and pyramids of sequence layers, which learn from each other in every layer.

Published are the parts and what they are for, not their formulas; what is written here is our
design. Units are the features and, of every history, the mean and DIN's interest. A Wukong layer
brings them to n_F + n_L units, with `next_event` a block every history from S_0 to S_1. Then in
layer i = 1..l interactions and sequences read the layer's inputs, X_i and S_i, so that they run
side by side:

  X_0     = [features | means | mean_e a(e, candidate) e],  X_1 = WukongLayer(X_0)
  X_sum   = W X_i, or an MLP over units, gated if asked for
  M_i     = LN(C X_i), some units;  M_0 = C X_0
  A       = attention of X_sum over the memories M_0 .. M_i
  S_sum   = [cross(X_sum, S) | cross(candidate, S) | PMA(S) | newest tokens], gated if asked for,
            over all branches S_i
  X_{i+1} = concat over the width of WukongLayer([X_i | S_sum | A])
  S_{i+1} = cell(S_i + LN(S_i) W(X_sum))   of every branch; cell: a transformer or an HSTU block

  ŷ       = MLP([X_0 | c | g * [X_{l+1} | S_sum]])   bent to the example's domain (DomainHeads)

with S_sum once more, of X_{l+1} and S_{l+1}, c the candidate as a token of every history, and gains
g (a number for each of D places of each unit) born at zero: GEM is born much as DIN is, and its
layers change a prediction only as far as that has paid. (Without `skip` the head reads X_{l+1} and
S_sum as they are.)

Pyramid: every history is read by branches of several strides side by side. The branch of stride 1
has all events, which attend inside blocks, 64 unless the config says otherwise. A branch of stride
s has the means of s neighbours, which attend over those before them inside blocks of 512, 4,096
events for s = 8. Both are O(T), and who asks a branch sees all of it. The full sequence lives on
from layer to layer (GEM's post).

With `next_event` the loss has a second part, so many times that of which item comes next, told by
S_1 = cell(S_0) before it has heard of the example (gemjax/layers/next_event.py). The item is the
first unit of the history's first column that shares a table with a feature of the example.

| choice                                                                        | whose       |
|-------------------------------------------------------------------------------|-------------|
| stackable factorization machines in depth and width, attention across layers  | GEM         |
| its formula: queries X_sum, keys from compressed outputs of all layers before | ours        |
| pyramid-parallel sequence modules                                             | GEM         |
| strides, means, one cell a branch and layer                                   | ours        |
| attention in blocks, QK-norm, rotary positions, PMA, cross attention          | GEM         |
| X_sum, S_sum, personalised W (queries of S_sum, LN before W, causal: ours)    | InterFormer |
| interest as a unit of X_0, the mean over events where DIN has the sum         | DIN, ours   |
| at the head, gains of what layers say, born at zero (as in ReZero 2003.04887) | ours        |
| a block in front whose outputs also tell the next event                       | DIEN, ours  |
| several domains over one trunk                                                | GEM         |
| heads of all domains, each bends them; its objectives: the labels of its rows | STAR, ours  |
| layers in one scan: compile time independent of l                             | ours        |

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
from gemjax.layers.exchange import UnitSummary
from gemjax.layers.interaction import UnitLinear
from gemjax.layers.interest import Interest
from gemjax.layers.memory import LayerMemory
from gemjax.layers.next_event import Next, NextEvent
from gemjax.layers.saved import ALL, Keeping, run, scan
from gemjax.layers.tokens import Tokens
from gemjax.models.branches import Branch, BranchLayer, BranchSummary, make_cell
from gemjax.models.heads import DomainHeads
from gemjax.models.wukong import STACKED, WukongLayer


class State(NamedTuple):
  """What a layer hands to the next."""

  x_BDN: jax.Array
  x_ED: tuple[jax.Array, ...]  # Of every branch.
  memory_BLKD: jax.Array


def _summary(config: config_lib.Gem, units: int, dim: int, **make) -> UnitSummary:
  return UnitSummary(units, config.cls, dim, gating=config.gating, mlp=config.sum_mlp, **make)


class GemLayer(nnx.Module):
  """One layer; see the module's docstring."""

  def __init__(
    self,
    config: config_lib.Gem,
    branches: tuple[Branch, ...],
    dim: int,
    dtype: str,
    rngs: nnx.Rngs,
    float8_mlp: bool,
  ):
    make = {"dtype": dtype, "rngs": rngs}
    units = config.fmb_units + config.lcb_units
    exchange = config.exchange and bool(branches)
    asked = config.memory_units or (exchange and (config.cross or config.personalised))
    self.units = _summary(config, units, dim, **make) if asked else None
    self.branches = nnx.List([BranchLayer(config, b, dim, dtype, rngs) for b in branches])
    summary = lambda: BranchSummary(config, branches, dim, dtype, rngs)
    self.summary = summary() if exchange else None
    remember = lambda: LayerMemory(units, config.memory_units, dim, **make)
    self.memory = remember() if config.memory_units else None
    inputs = units + (self.summary.outputs if self.summary is not None else 0)
    inputs += config.cls if config.memory_units else 0
    share = dataclasses.replace(
      config,
      fmb_units=config.fmb_units // config.width,
      lcb_units=config.lcb_units // config.width,
    )
    self.blocks = nnx.List(
      [WukongLayer(share, inputs, dim, dtype, rngs, float8_mlp) for _ in range(config.width)]
    )

  @jax.named_scope("gem_layer")
  def __call__(
    self, state: State, branches: list[Tokens], candidates: list[jax.Array], index, key_B: Key
  ) -> State:
    """Layer number `index`, from 1 on: as many memories are written before its own."""
    key = lambda part: fold(key_B, part)
    sequences = [b._replace(x_ED=x_ED) for b, x_ED in zip(branches, state.x_ED)]
    x_sum_BMD = None if self.units is None else self.units(state.x_BDN)
    input_BDN, memory_BLKD = [state.x_BDN], state.memory_BLKD
    turned = lambda x_BMD: rearrange(x_BMD, "b m d -> b d m")
    if self.summary is not None:
      input_BDN.append(turned(self.summary(x_sum_BMD, sequences, candidates)))
    if self.memory is not None:
      memory_BLKD = self.memory.write(state.x_BDN, memory_BLKD, index)
      input_BDN.append(turned(self.memory.read(x_sum_BMD, memory_BLKD, index + 1)))
    input_BDN = jnp.concatenate(input_BDN, 2)
    x_BDN = jnp.concatenate([b(input_BDN, key(2 * w)) for w, b in enumerate(self.blocks)], 2)
    x_ED = tuple(
      layer(tokens, x_sum_BMD, key(2 * b + 1))
      for b, (layer, tokens) in enumerate(zip(self.branches, sequences))
    )
    return State(x_BDN, x_ED, memory_BLKD)


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
    keeping: Keeping = ALL,
    float8_mlp: bool = False,
  ):
    self.keeping = keeping
    make = {"dtype": dtype, "rngs": rngs}
    outputs = config.fmb_units + config.lcb_units
    histories = histories if config.strides or config.interest else ()
    self.names = tuple(h.name for h in histories)
    self.events = nnx.List([EventInput(h, dim, **make) for h in histories])
    interest = lambda: Interest((config.interest,), dim, mean=True, **make)
    self.interests = nnx.List([interest() for _ in histories] if config.interest else [])
    units += len(self.interests)
    self.branches = tuple(
      Branch(h.name, stride, -(-h.length // stride)) for h in histories for stride in config.strides
    )
    ahead = histories if config.next_event else ()
    front = lambda h: make_cell(config, Branch(h.name, 1, h.length), dim, dtype, rngs)
    self.fronts = nnx.List([front(h) for h in ahead])
    self.next = nnx.List([NextEvent(dim, **make) for _ in ahead])
    remember = lambda: UnitLinear(units, config.memory_units, **make)
    self.memory = remember() if config.memory_units else None
    self.first = WukongLayer(config, units, dim, dtype, rngs, float8_mlp)
    stack = nnx.split_rngs(splits=config.layers)(
      nnx.vmap(
        lambda rngs: GemLayer(config, self.branches, dim, dtype, rngs, float8_mlp),
        transform_metadata=STACKED,
      )
    )
    self.layers = stack(rngs)
    self.units = _summary(config, outputs, dim, **make) if self.branches and config.cross else None
    summary = lambda: BranchSummary(config, self.branches, dim, dtype, rngs)
    self.summary = summary() if self.branches else None
    deep = outputs + (self.summary.outputs if self.summary is not None else 0)
    skipped = units + len(self.events) if config.skip else 0
    gain = lambda: nnx.Param(jnp.full((deep, dim), config.gain, "float32"), axes=("width", "width"))
    self.gain_ND = gain() if config.skip else None
    inputs = (skipped + deep) * dim
    self.heads = DomainHeads(inputs, config.head, tasks, domains, config.dropout, dtype, rngs)
    self.depth, self.memory_units = config.layers, config.memory_units

  def __call__(
    self,
    x_BND: jax.Array,
    histories: dict[str, EventRows],
    key_B: Key = None,
    domain_B: jax.Array | None = None,
  ) -> jax.Array:
    B, _, D = x_BND.shape
    kept = self.keeping
    tokens = [run(kept, events, histories[name]) for name, events in zip(self.names, self.events)]
    asking = [events.candidate(x_BND) for events in self.events]
    interests = [run(kept, of, *past)[:, None] for of, *past in zip(self.interests, tokens, asking)]
    x_BND = jnp.concatenate([x_BND, *interests], 1)
    for i, (front, follow) in enumerate(zip(self.fronts, self.next)):
      key = fold(fold(key_B, 3), i)
      tokens[i] = tokens[i]._replace(x_ED=run(kept, front, tokens[i], key))
      item = next(place for place, unit in enumerate(self.events[i].places) if unit >= 0)
      item_ED = histories[self.names[i]].units_EFD[:, item]
      self.sow(Next, "following", run(kept, follow, tokens[i], item_ED))
    past, candidate = dict(zip(self.names, tokens)), dict(zip(self.names, asking))
    branches = [
      past[name] if stride == 1 else tokens_lib.coarsen(past[name], stride)
      for name, stride, _ in self.branches
    ]
    candidates = [candidate[name] for name, _, _ in self.branches]
    x_BDN = rearrange(x_BND, "b n d -> b d n")
    memory_BLKD = jnp.zeros((B, self.depth + 1, self.memory_units, D), x_BND.dtype)
    if self.memory is not None:
      memory_BLKD = memory_BLKD.at[:, 0].set(rearrange(self.memory(x_BDN), "b d k -> b k d"))
    state = State(
      x_BDN=run(kept, self.first, x_BDN, fold(key_B, 0), layer=0),
      x_ED=tuple(b.x_ED for b in branches),
      memory_BLKD=memory_BLKD,
    )
    graph, weights = nnx.split(self.layers)

    def layer(weights, state, index, branches, candidates, key_B):
      key = fold(fold(key_B, 1), index + 1)
      return nnx.merge(graph, weights)(state, branches, candidates, index + 1, key)

    state = scan(kept, layer, state, weights, branches, candidates, key_B, first=1)
    units_BND = rearrange(state.x_BDN, "b d n -> b n d")
    if self.summary is not None:
      sequences = [b._replace(x_ED=x_ED) for b, x_ED in zip(branches, state.x_ED)]
      x_sum_BMD = None if self.units is None else self.units(state.x_BDN)
      s_sum_BMD = run(kept, self.summary, x_sum_BMD, sequences, candidates)
      units_BND = jnp.concatenate([units_BND, s_sum_BMD], 1)
    if self.gain_ND is not None:
      gained_BND = units_BND * self.gain_ND[...].astype(units_BND.dtype)
      units_BND = jnp.concatenate([x_BND, *(c_BD[:, None] for c_BD in asking), gained_BND], 1)
    read_BI = rearrange(units_BND, "b n d -> b (n d)")
    return run(kept, self.heads, read_BI, domain_B, fold(key_B, 2), last=True)
