"""The experiment of the next item: a sequence tower alone, without a candidate's features."""

import dataclasses
import math
from typing import Any

from gemjax import fields
from gemjax.config.experiment import Optimizer
from gemjax.config.laws import one_of, real
from gemjax.config.sequences import Attention, validate_attention
from gemjax.fields import need


@dataclasses.dataclass(kw_only=True, slots=True)
class Tower:
  """See gemjax/models/next_item.py."""

  cell: str = "hstu"  # hstu | public_hstu | transformer
  layers: int = 2
  dim: int = 64
  attention: Attention = dataclasses.field(default_factory=Attention)
  hidden: int = 128  # Of a transformer's feed-forward part.
  dropout: float = 0.2
  negatives: int = 0  # Items that a step's softmax is taken over; 0: all.
  places: int = 0  # That have a row, and what HSTU divides by; 0: as many as events are read.
  score: str = "dot"  # dot: with an item's popularity | cosine
  temperature: float = 0.05  # That a cosine is divided by.


@dataclasses.dataclass(kw_only=True, slots=True)
class NextItem:
  """One experiment: trains on every item but the held-out ones, then ranks all items."""

  name: str
  path: str = "ml-1m"  # Folder of MovieLens.
  length: int = 200  # Newest events of a user that are read.
  own_ids: bool = False  # Whether items keep their numbers: there is a row for all up to the last.
  split: str = "test"  # test: each user's last item; valid: the one before it, the last unread.
  batch_size: int = 128  # Users.
  epochs: int = 40
  eval_every: int = 10  # Epochs between two looks at the held-out items.
  seed: int = 0
  tower: Tower = dataclasses.field(default_factory=Tower)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)

  def to_json(self) -> dict[str, Any]:
    return fields.to_json(self)

  @classmethod
  def from_json(cls, tree: dict[str, Any]) -> "NextItem":
    """Inverse of `to_json`; raises ConfigError for fields that do not exist."""
    return fields.from_json(cls, tree, "config")

  def validate(self) -> None:
    """Raises ConfigError for the first field outside its law."""
    fields.check_types(self)
    tower, opt = self.tower, self.optimizer
    need(self.path, "path", self.path, "a folder")
    for name in ("length", "batch_size", "epochs", "eval_every"):
      need(getattr(self, name) > 0, name, getattr(self, name), "positive")
    need(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2^31)")
    one_of(self.split, "split", "test", "valid")
    one_of(tower.cell, "tower.cell", "hstu", "public_hstu", "transformer")
    one_of(tower.score, "tower.score", "dot", "cosine")
    need(0 < tower.temperature < math.inf, "tower.temperature", tower.temperature, "positive")
    places = tower.places or self.length
    law = f"0 or at least config.length, {self.length}"
    need(places >= self.length, "tower.places", tower.places, law)
    if tower.cell == "public_hstu":
      law = "as by default but for its heads, where tower.cell is public_hstu"
      plain = Attention(heads=tower.attention.heads)
      need(tower.attention == plain, "tower.attention", tower.attention, law)
    for name in ("layers", "dim", "hidden"):
      need(getattr(tower, name) > 0, f"tower.{name}", getattr(tower, name), "positive")
    need(tower.negatives >= 0, "tower.negatives", tower.negatives, "at least 0")
    need(real(tower.dropout) and tower.dropout < 1, "tower.dropout", tower.dropout, "in [0, 1)")
    validate_attention(tower.attention, "tower.attention", tower.dim)
    for name in ("learning_rate", "clip_norm", "l2"):
      value = getattr(opt, name)
      need(real(value), f"optimizer.{name}", value, "a finite number of at least 0")
    need(real(opt.warmup, high=1.0), "optimizer.warmup", opt.warmup, "a share of steps in [0, 1]")
    one_of(opt.schedule, "optimizer.schedule", "constant", "linear", "cosine")
