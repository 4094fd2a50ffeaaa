"""DIN, SASRec and HSTU against their formulas; what a ranker tells its model of histories."""

import numpy as np
import pytest
from flax import nnx
from history_case import SPECS, Case, D, N, T
from numpy_layers import candidate_token, event_tokens, heads
from sequence_oracle import hstu, layer_norm, mlp, transformer

from gemjax import config as c
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
    interest = np.zeros(D)
    for e in event_tokens(units, age, w["events"][i]):
      interest += mlp(np.concatenate([e, c, e - c, e * c]), w["weights"][i]) * e
    parts += [interest, c]
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
  make = lambda: kind(
    config,
    units=N,
    dim=D,
    tasks=T,
    histories=SPECS[:histories],
    dtype="float32",
    rngs=nnx.Rngs(0),
  )
  return Case(make, oracle, histories=histories)


def test_din():
  case(Din, c.Din(hidden=(7,), head=(6,)), din).check_all()


@pytest.mark.parametrize("config", [SASREC, HSTU], ids=["sasrec", "hstu"])
def test_sequence_rankers(config):
  oracle = lambda *args: sequence_ranker(config, *args)
  case(SequenceRanker, config, oracle, histories=3 - config.layers).check_all()
