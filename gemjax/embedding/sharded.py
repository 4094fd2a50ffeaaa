"""All stacks of a run on a data x model mesh. Every method is the code of one device, to be called
inside `jax.shard_map` over both axes, `specs` excepted.

A step is plan -> lookup -> update. The plan holds everything that follows from the ids alone,
sorting and exchange of ids included, so that the plan of the next batch can be made while this
batch is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemjax import config as config_lib
from gemjax.config import DATA, MODEL
from gemjax.embedding.column import ColumnSharded
from gemjax.embedding.held import Held
from gemjax.embedding.lookup import Rows, positions
from gemjax.embedding.replicated import Replicated
from gemjax.embedding.row import RowSharded
from gemjax.embedding.row_optimizers import ROW_OPTIMIZERS
from gemjax.embedding.stack import Stack, StackRule
from gemjax.embedding.tables import StackLayout, TableLayout, check_mesh
from gemjax.features import Batch

Stacks = dict[str, Stack]
Plans = dict[str, Any]  # Stack name -> the plan of its placement.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardedTables:
  """The stacks of `layout` on a mesh of data x model devices.

  Across `data`, whose groups hold copies of all stacks, `config.replicas` is one of

  exact    every update combines the gradients of all groups: copies stay equal to the bit
  average  a group updates its copy from its own examples alone; every `average_every` steps rows
           and optimiser state are averaged. A group's gradient is the mean over its examples, so
           that v grows D times too fast: the step is lr / (sqrt(v / D) + eps) (momentum scaling,
           arXiv 2508.03854)
  """

  layout: TableLayout
  config: config_lib.Embedding
  data: int
  model: int
  capacity: dict[str, int] = dataclasses.field(default_factory=dict)  # Of row stacks.

  @classmethod
  def on_mesh(
    cls, layout: TableLayout, config: config_lib.Embedding, data: int, model: int
  ) -> ShardedTables:
    """With the capacity of `config.exchange_rows`, or none yet where that is 0.

    Raises:
      ConfigError: a stack cannot be split over so many devices.
    """
    check_mesh(layout, model)
    capacity = {s.name: config.exchange_rows for s in layout.stacks if config.exchange_rows}
    return cls(layout=layout, config=config, data=data, model=model, capacity=capacity)

  def init(self, key: jax.Array) -> Stacks:
    """The stacks before the first step; the same rows on every mesh."""
    keys = self._keys(key)
    return {s.name: self.rule(s).init(keys[s.name], self._held(s)) for s in self.layout.stacks}

  def born(self, key: jax.Array, s: StackLayout, row_N: jax.Array) -> jax.Array:
    """(N, W) float32: whole rows of a stack as `init` draws them with the same key."""
    held = Held.whole(s.rows, s.width)
    return self.rule(s).born(self._keys(key)[s.name], held, row_N)

  def plan(self, batch: Batch) -> Plans:
    """Finds duplicates and exchanges ids."""
    return self._planned(positions(self.layout, batch))

  def of_no_row(self, batch: Batch, dtype: str) -> tuple[Plans, Rows]:
    """(plans, gradients of `dtype`) in the shapes of `batch`, whose update writes nothing."""
    at = positions(self.layout, batch)
    with jax.enable_x64(True):
      nowhere = self._each(lambda s, at_M: jnp.full_like(at_M, s.rows), at)
    grads = self._each(lambda s, at_M: jnp.zeros((len(at_M), s.width), dtype), at)
    return self._planned(nowhere), grads

  def lookup(self, stacks: Stacks, plans: Plans) -> Rows:
    """Stack name -> (M, W) rows in the order of `positions`, in the type in which they arrive."""
    return self._each(
      lambda s, stack, plan: self._placed(s).lookup(self.rule(s), stack, plan), stacks, plans
    )

  def update(
    self,
    stacks: Stacks,
    plans: Plans,
    grads: Rows,
    learning_rate: jax.Array,
    key: jax.Array,
  ) -> Stacks:
    """One optimiser step on the looked-up rows.

    Args:
      stacks: Overwritten where the caller donates them.
      plans: Of the same batch.
      grads: Of the sum over all devices' examples, with respect to the rows of `lookup`; summed in
        float32 whatever their type.
      learning_rate: Scalar of this step.
      key: Of this step.
    """
    keys = self._keys(key)

    def update(s: StackLayout, stack, plan, grad_MW):
      if self.averaged:
        grad_MW = grad_MW.astype(jnp.float32) * self.data
      rule, placed = self.rule(s), self._placed(s)
      return placed.update(rule, stack, plan, grad_MW, learning_rate, keys[s.name])

    return self._each(update, stacks, plans, grads)

  def average(self, stacks: Stacks, key: jax.Array) -> Stacks:
    """Makes the copies of the groups equal again: `average` mode, every `average_every` steps."""
    keys = self._keys(key)
    return self._each(
      lambda s, stack: self.rule(s).average(stack, DATA, keys[s.name], self._held(s)), stacks
    )

  def rounds(self, plans: Plans) -> jax.Array:
    """Exchanges that the batch took, of the stack that took most; the same on all devices."""
    counts = self._each(lambda s, plan: self._placed(s).rounds(plan), plans)
    return jnp.max(jnp.stack([jnp.zeros((), jnp.int32), *counts.values()]))

  def bucket_sizes(self, batch: Batch) -> dict[str, jax.Array]:
    """Row stack -> (L,) int32: different rows that this device wants of every owner."""
    at = positions(self.layout, batch)
    exchanged = [s for s in self.layout.stacks if self._exchanged(s)]
    return {s.name: self._placed(s).bucket_sizes(at[s.name]) for s in exchanged}

  def with_capacity(self, largest: dict[str, int]) -> ShardedTables:
    """Room for the `largest` bucket seen of every row stack, and a margin: a sixteenth for data
    that drift and two standard deviations of a bucket's size, up to the next of 16 steps an
    octave, so that restarts meet the same program. A second round costs as much as the first.
    """
    return dataclasses.replace(
      self,
      capacity={n: _step_up(17 / 16 * c + 2 * math.sqrt(c) + 1) for n, c in largest.items()},
    )

  @property
  def measured(self) -> bool:
    """Whether every row stack has a capacity."""
    return all(s.name in self.capacity for s in self.layout.stacks if self._exchanged(s))

  def state_bytes(self) -> int:
    """Of all stacks with their state, whole."""
    few, total = 8, 0
    for s in self.layout.stacks:
      shapes = self._shapes(s, few)._replace(clock=None)
      total += s.rows * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) // few
    return total

  def specs(self) -> dict[str, Stack]:
    """PartitionSpecs of the stacks, in their structure."""
    return {s.name: self._spec(s) for s in self.layout.stacks}

  def _planned(self, at: dict[str, jax.Array]) -> Plans:
    return self._each(lambda s, at_M: self._placed(s).plan(at_M), at)

  def _shapes(self, s: StackLayout, rows: int) -> Stack:
    """Of the first rows."""
    rule, held = self.rule(s), Held.whole(rows, s.width)
    return jax.eval_shape(lambda: rule.init(jax.random.key(0), held))

  def _spec(self, s: StackLayout) -> Stack:
    shapes = self._shapes(s, 8)
    row = MODEL if s.placement == "row" else None
    column = MODEL if s.placement == "column" else None
    # (R, W) as the rows; (R,) one a row; the clock is the same everywhere.
    spec = lambda x: PartitionSpec(row, column) if x.ndim == 2 else PartitionSpec(row)
    return jax.tree.map(spec, shapes)._replace(
      clock=None if shapes.clock is None else PartitionSpec()
    )

  @property
  def averaged(self) -> bool:
    """Whether copies differ between two calls of `average`."""
    return self.config.replicas == "average" and self.data > 1

  def _exchanged(self, s: StackLayout) -> bool:
    return s.placement == "row" and self.model > 1

  def rule(self, s: StackLayout) -> StackRule:
    """How the stack is born, read and updated."""
    split = s.placement == "column" and self.model > 1
    optimizer = ROW_OPTIMIZERS[self.config.optimizer](
      self.config.eps,
      accumulated=self.data if self.averaged else 1,
      axis=MODEL if split else None,
    )
    return StackRule.from_config(self.config, optimizer)

  def _held(self, s: StackLayout) -> Held:
    whole = Held.whole(s.rows, s.width)
    if self.model == 1 or s.placement == "replicated":
      return whole
    share = jax.lax.axis_index(MODEL)
    if s.placement == "row":
      return whole._replace(rows=s.rows // self.model, share=share)
    return whole._replace(width=s.width // self.model, column_share=share)

  def _placed(self, s: StackLayout) -> RowSharded | ColumnSharded | Replicated:
    combined = self.data > 1 and not self.averaged
    held = self._held(s)
    if self._exchanged(s):
      # Without a measurement all ids may be different: an even share of each, to be replaced.
      capacity = self.capacity.get(s.name, 1)
      return RowSharded(held=held, model=self.model, capacity=capacity, combined=combined)
    if s.placement == "column" and self.model > 1:
      return ColumnSharded(held=held, model=self.model, combined=combined)
    inside = (MODEL,) if s.placement == "replicated" and self.model > 1 else ()
    return Replicated(held=held, axes=(*((DATA,) if combined else ()), *inside))

  def _keys(self, key: jax.Array) -> dict[str, jax.Array]:
    return {s.name: jax.random.fold_in(key, i) for i, s in enumerate(self.layout.stacks)}

  def _each(self, function: Callable, *trees: dict[str, Any]) -> dict[str, Any]:
    return {s.name: function(s, *(tree[s.name] for tree in trees)) for s in self.layout.stacks}


def _step_up(size: float) -> int:
  """The smallest k * 2^e, 16 <= k < 32, that holds `size`; a whole number below 16."""
  step = 2 ** max(0, math.floor(math.log2(size)) - 4)
  return math.ceil(size / step) * step
