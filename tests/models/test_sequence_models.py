"""DIN, SASRec and HSTU against their formulas; what a ranker tells its model of histories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from history_case import LENGTHS, SPECS, B, Case, D, N, T, ends, make_histories, maker
from numpy_layers import candidate_token, event_tokens, heads, interest
from sequence_oracle import hstu, layer_norm, transformer

from gemjax import config as c
from gemjax.layers.events import EventRows
from gemjax.models import Ranker
from gemjax.models.din import Din
from gemjax.models.sequence_ranker import SequenceRanker

ATTENTION = c.Attention(heads=2, position_buckets=6, time_buckets=33, rope=50.0)
SASREC = c.Sasrec(layers=2, attention=ATTENTION, hidden=9, head=(6,))
HSTU = c.Hstu(layers=1, attention=ATTENTION, head=(6,))


def din(w, x, histories):
  """v = sum_e MLP([e, c, e - c, e * c]) e, not normalised."""
  parts = [x.reshape(-1)]
  for i, (units, age) in enumerate(histories):
    c = candidate_token(x, SPECS[i].candidate, w["events"][i])[0]
    parts += [interest(event_tokens(units, age, w["events"][i]), c, w["interests"][i]), c]
  return heads(np.concatenate(parts), w["heads"])


def sequence_ranker(config, w, x, histories):
  """The candidate is the newest token; what its place puts out joins the units."""
  parts = [x.reshape(-1)]
  for i, (units, age) in enumerate(histories):
    events, candidate = w["events"][i], candidate_token(x, SPECS[i].candidate, w["events"][i])
    s, age = np.concatenate([event_tokens(units, age, events), candidate]), [*age, 0]
    for layer in range(config.layers):
      block = w["stacks"][i][layer]
      if isinstance(config, c.Hstu):
        s = hstu(s, age, block, config.attention, norm=SPECS[i].length + 1)
      else:
        s = transformer(s, age, block, config.attention, causal=True)
    parts.append(layer_norm(s[-1], w["norms"][i]))
  return heads(np.concatenate(parts), w["heads"])


def case(kind, config, oracle, histories=2):
  return Case(maker(kind, config, histories), oracle, histories=histories)


def test_din():
  case(Din, c.Din(hidden=(7,), head=(6,)), din).check_all()


@pytest.mark.parametrize("config", [SASREC, HSTU], ids=["sasrec", "hstu"])
def test_sequence_rankers(config):
  oracle = lambda *args: sequence_ranker(config, *args)
  case(SequenceRanker, config, oracle, histories=3 - config.layers).check_all()


def ranker(model):
  """Of two dense units, then N looked-up ones; the ranker, and what it reads."""
  config = c.Config(name="x", model=model, embedding=c.Embedding(dim=D, dense_units=2))
  made = Ranker(config, units=N, small=0, dense=3, tasks=T, histories=SPECS, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return made, (normal(B, N, D), normal(B, 0, 4), normal(B, 3))


def test_a_model_without_histories_reads_the_means_of_their_units():
  made, inputs = ranker(c.Mlp(head=()))
  rows = {
    name: EventRows(*map(jnp.asarray, parts), jnp.array(LENGTHS[name]))
    for name, parts in make_histories().items()
  }
  logits = made(*inputs, None, rows)
  np.testing.assert_allclose(jax.jit(made)(*inputs, None, rows), logits, rtol=1e-5, atol=1e-5)
  # Units of histories follow in the order of the histories' names.
  x_BND = made.inputs(*inputs)
  means = np.zeros((B, 3, D))
  for first, name in ((0, "buys"), (1, "views")):
    units_EFD = make_histories()[name][0]
    for b, (start, end) in enumerate(zip(ends(name), ends(name)[1:])):
      if end > start:
        means[b, first : first + units_EFD.shape[1]] = units_EFD[start:end].mean(0)
  w = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(made.model.heads, nnx.Param)))
  wanted = [heads(np.concatenate([x, m]), w) for x, m in zip(x_BND, means)]
  np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_candidate_is_counted_among_the_looked_up_units():
  """Dense units stand before them in what the model reads."""
  made, inputs = ranker(c.Din(hidden=(4,), head=(4,)))
  x_BND = made.inputs(*inputs)
  for spec, events in zip(SPECS, made.model.events):
    w = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(events, nnx.Param)))
    wanted = [candidate_token(np.asarray(x), spec.candidate, w)[0] for x in inputs[0]]
    np.testing.assert_allclose(events.candidate(x_BND), wanted, rtol=1e-4, atol=1e-5)
