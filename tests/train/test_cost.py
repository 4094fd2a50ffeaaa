"""What events cost, against pairs counted one by one and against the traced model."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from gemjax import config as c
from gemjax.layers.events import EventRows, HistorySpec
from gemjax.models.gem import Gem
from gemjax.train.cost import example_cost, jagged_flops
from gemjax.train.flops import matmul_flops

D = 16
WHOLE, BLOCKS = c.Attention(), c.Attention(block=8)
GEM = c.Gem(layers=3, strides=(1, 4), fine=BLOCKS, coarse=WHOLE, cls=2, pma=3)


def config(model):
  return c.Config(name="x", embedding=c.Embedding(dim=D), model=model)


def cost(model, *lengths):
  return example_cost(config(model), {"views": np.array(lengths)})


def products(tokens, block, causal, queries, personal):
  """FLOPs of one layer over the tokens of one example: each pair a product for its score and one
  for its value, queries see all tokens.
  """
  pairs = 0
  for t in range(tokens):
    for e in range(tokens):
      pairs += (e <= t or not causal) and (not block or t // block == e // block)
  return 2 * 2 * D * (pairs + queries * tokens) + personal * 2 * D * D * tokens


@pytest.mark.parametrize("lengths", [(0,), (16, 0, 32), (8, 64), (7, 13, 30)])
def test_products_of_pairs(lengths):
  flops = lambda model: jagged_flops(config(model), {"views": np.array(lengths)})
  tokens = lambda n: ((n, 8), (-(-n // 4), 0))  # Of every branch, and its blocks.
  gem = sum(3 * products(*of, True, 6, True) for n in lengths for of in tokens(n))
  gem += sum(2 * 2 * D * 6 * of for n in lengths for of, _ in tokens(n))  # Asked at the head, too.
  assert flops(GEM) == 3 * gem
  alone = sum(3 * products(n, 8, True, 0, False) + products(n, 0, False, 6, False) -
              products(n, 0, False, 0, False) for n in lengths)  # fmt: skip
  late = dataclasses.replace(GEM, strides=(1,), exchange=False)
  assert flops(late) == 3 * alone
  sasrec = sum(2 * products(n + 1, 0, True, 0, False) for n in lengths)
  assert flops(c.Sasrec(layers=2, attention=WHOLE)) == 3 * sasrec
  cls = c.InterFormer().cls
  interformer = sum(2 * products(n + cls, 0, False, 4, True) for n in lengths)
  interformer += sum(4 * 4 * D * (n + cls) for n in lengths)  # The last summary.
  assert flops(c.InterFormer(layers=2, pma=4, attention=WHOLE)) == 3 * interformer
  assert flops(c.Wukong()) == flops(c.Din()) == 0


def test_what_has_attention_over_all_events_costs_more_than_events():
  fine = dataclasses.replace(GEM, strides=(1,))
  short, middle, long = cost(fine, 800, 1600, 2400)
  assert middle - short == long - middle == short  # Blocks: as many keys whatever the length.
  short, middle, long = cost(dataclasses.replace(GEM, strides=(4,)), 800, 1600, 2400)
  assert long - middle > 1.1 * (middle - short)
  assert np.all(np.diff(cost(GEM, *range(0, 200, 7))) > 0)


def test_histories_add_up_and_a_model_without_attention_reads_each_event_once():
  lengths = {"views": np.array([3, 0, 90]), "buys": np.array([5, 0, 1])}
  both = example_cost(config(GEM), lengths)
  np.testing.assert_allclose(both, cost(GEM, 3, 0, 90) + cost(GEM, 5, 0, 1))
  assert both[1] == 0
  np.testing.assert_array_equal(example_cost(config(c.Wukong()), lengths), [8, 0, 91])


def test_an_event_costs_about_what_the_model_multiplies_for_it():
  """Products of the traced model that grow with the room for events, and those of pairs."""
  model = dataclasses.replace(GEM, layers=4, strides=(1,))
  spec = HistorySpec("views", units=1, length=64, candidate=(-1,))
  make = lambda: Gem(
    model,
    units=3,
    dim=D,
    tasks=1,
    histories=(spec,),
    domains=0,
    dtype="float32",
    rngs=nnx.Rngs(0),
  )
  graph, params = nnx.split(nnx.eval_shape(make))

  def traced(events):
    shape = jax.ShapeDtypeStruct
    rows = EventRows(
      shape((events, 1, D), np.float32), shape((events,), np.int32), shape((2,), np.int32)
    )
    run = lambda params, x_BND, rows: nnx.merge(graph, params)(x_BND, {"views": rows})
    return matmul_flops(run, params, shape((2, 3, D), np.float32), rows)

  events = 64
  dense = traced(2 * events) - traced(events)
  pairs = jagged_flops(config(model), {"views": np.array([events])}) / 3
  assert 0.75 < (dense + pairs) / cost(model, events)[0] < 1.3
