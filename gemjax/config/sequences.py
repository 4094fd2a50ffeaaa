"""The models that read histories, one dataclass each."""

import dataclasses
from typing import Any

from gemjax.config.laws import one_of, real
from gemjax.fields import need


@dataclasses.dataclass(kw_only=True, slots=True)
class Attention:
  """Of a sequence's events over its events; 0 switches a part off."""

  heads: int = 2
  block: int = 0  # Events see their own block of so many: O(T) (GEM's BlockAttention has 64).
  window: int = 0  # Events see the nearest so many: O(T).
  rope: float = 0.0  # Base of rotary positions, such as 10000.
  qk_norm: bool = False
  position_buckets: int = 0  # Of a bias by distance in events.
  time_buckets: int = 0  # Of a bias by distance in time, logarithmic.


@dataclasses.dataclass(kw_only=True, slots=True)
class Din:
  """Deep interest network; see gemjax/models/din.py."""

  hidden: tuple[int, ...] = (64,)  # Of the MLP that weighs an event against the candidate.
  head: tuple[int, ...] = (256, 128)
  dropout: float = 0.0
  feature_dropout: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Sasrec:
  """Transformer over events, the candidate last; see gemjax/models/sequence_ranker.py."""

  layers: int = 2
  attention: Attention = dataclasses.field(default_factory=Attention)
  hidden: int = 128  # Of the blocks' feed-forward part.
  head: tuple[int, ...] = (256, 128)
  dropout: float = 0.0
  feature_dropout: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Hstu:
  """HSTU over events, the candidate last; see gemjax/models/sequence_ranker.py."""

  layers: int = 2
  attention: Attention = dataclasses.field(
    default_factory=lambda: Attention(position_buckets=32, time_buckets=32)
  )
  head: tuple[int, ...] = (256, 128)
  dropout: float = 0.0
  feature_dropout: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class InterFormer:
  """InterFormer (arXiv 2411.09852); see gemjax/models/interformer.py."""

  layers: int = 2
  cls: int = 4  # Tokens of X_sum in front of every sequence.
  pma: int = 2  # Learnt queries that pool a sequence.
  recent: int = 2  # Newest events that are passed on as they are.
  gating: str = "sigmoid"  # sigmoid | tanh | identity
  attention: Attention = dataclasses.field(default_factory=lambda: Attention(rope=10000.0))
  rank: int = 8  # k of the interaction.
  mlp: tuple[int, ...] = (256,)
  head: tuple[int, ...] = (128,)
  dropout: float = 0.0
  feature_dropout: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Gem:
  """GEM; see gemjax/models/gem.py. Every part can be switched off; what describes it is then not
  read: without strides nothing of the towers is, without a stride of 1 nothing of `fine`.
  """

  layers: int = 2
  # Interaction tower: Wukong's layers.
  fmb_units: int = 16  # n_F
  lcb_units: int = 16  # n_L
  rank: int = 8  # k
  fm: str = "optimised"  # basic | optimised | attentive
  mlp: tuple[int, ...] = (256,)
  width: int = 1  # Blocks side by side in a layer, which share its units out among them.
  memory_units: int = 4  # Of a layer's input, over which it and later layers attend; 0: none.
  pooled: bool = True  # Whether means over histories are units of the input.
  interest: int = 64  # So are means of events as DIN weighs them, with so many hidden; 0: none.
  skip: bool = True  # Whether the head reads the input's units and the candidates, too.
  gain: float = 0.0  # Of what it then reads of the layers, at birth.
  # Sequence towers: for every history a pyramid of branches side by side.
  strides: tuple[int, ...] = (1, 8)  # Events a token of each branch; (): no towers.
  cell: str = "transformer"  # transformer | hstu
  # Weight of the loss of which event comes next, by a history's first column that shares a table
  # with a feature, told by a block in front of all; 0: neither.
  next_event: float = 0.0
  fine: Attention = dataclasses.field(
    default_factory=lambda: Attention(block=64, rope=10000.0, qk_norm=True)
  )  # Of branches of stride 1.
  coarse: Attention = dataclasses.field(
    default_factory=lambda: Attention(block=512, rope=10000.0, qk_norm=True)
  )  # Of the others, and of the pooling of all; see CrossAttention for what it takes.
  # Exchange between the two: InterFormer's.
  exchange: bool = True  # In every layer; otherwise sequences meet interactions in the head alone.
  personalised: bool = True  # A feed-forward matrix of its own for every example.
  cls: int = 4  # n_sum, units of X_sum.
  sum_mlp: bool = False  # X_sum is an MLP over units as InterFormer's, not a linear map.
  cross: bool = True  # X_sum attends over every branch.
  target: bool = True  # So does the candidate, as a token like the events'.
  pma: int = 2
  recent: int = 2  # Newest events of the branch of stride 1.
  gating: str = "none"  # sigmoid | tanh | identity, InterFormer's gates; none.
  domain: str = ""  # Sparse feature whose every value bends the heads to its own.
  head: tuple[int, ...] = (128,)
  dropout: float = 0.0
  feature_dropout: float = 0.0


def validate_attention(attention: Attention, name: str, dim: int) -> None:
  """Raises ConfigError for the first field outside its law; `dim` is the width of a token."""
  heads = attention.heads
  need(heads > 0 and dim % heads == 0, f"{name}.heads", heads, f"a divisor of the width {dim}")
  even = dim // heads % 2 == 0 or not attention.rope
  need(even, f"{name}.rope", attention.rope, f"0 where a head's width, {dim // heads}, is odd")
  for field in ("block", "window", "position_buckets", "time_buckets"):
    value = getattr(attention, field)
    need(value >= 0, f"{name}.{field}", value, "at least 0")
  rope = attention.rope
  need(rope == 0 or 1 < rope < 1e12, f"{name}.rope", rope, "0 or a base above 1")


def validate_gem(model: Any, prefix: str) -> None:
  """Raises ConfigError for the first field outside its law."""
  one_of(model.cell, f"{prefix}.cell", "transformer", "hstu")
  law = "a tuple of positive numbers of events, each once"
  need(
    all(s > 0 for s in model.strides) and len(set(model.strides)) == len(model.strides),
    f"{prefix}.strides", model.strides, law,
  )  # fmt: skip
  outputs = model.fmb_units + model.lcb_units
  for name in ("fmb_units", "lcb_units"):
    law = f"divisible by config.{prefix}.width, {model.width}"
    need(getattr(model, name) % model.width == 0, f"{prefix}.{name}", getattr(model, name), law)
  need(model.memory_units <= outputs, f"{prefix}.memory_units", model.memory_units,
       f"at most the {outputs} units of a layer")  # fmt: skip
  ahead = model.next_event
  need(real(ahead), f"{prefix}.next_event", ahead, "a finite number of at least 0")
  need(model.strides or not ahead, f"{prefix}.next_event", ahead, "0 without strides")
  newest = model.recent and model.strides == (1,)
  need(real(model.gain), f"{prefix}.gain", model.gain, "a finite number of at least 0")
  told = model.cross or model.target or model.pma or newest
  law = "(), or (1,) with recent, where cross, target and pma are off: else a branch says nothing"
  need(not model.strides or told, f"{prefix}.strides", model.strides, law)
  events = not model.strides or 1 in model.strides
  law = f"0 where config.{prefix}.strides, {model.strides}, has no 1: others have no events to pass"
  need(events or not model.recent, f"{prefix}.recent", model.recent, law)
  need(
    model.skip or not model.gain, f"{prefix}.gain", model.gain, "0 without skip: nothing reads it"
  )
