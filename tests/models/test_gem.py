"""GEM against a transcription of its formulas, whole and with each of its parts switched off."""

import copy
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from history_case import FAST, SPECS, B, Case, T, maker
from numpy_layers import (
  candidate_token,
  coarsen,
  event_tokens,
  gating,
  heads,
  interest,
  over_units,
  personalised,
  remembered,
  sequence_summary,
  unit_summary,
  wukong_layer,
)
from sequence_oracle import hstu, layer_norm, transformer

from gemjax import config as c
from gemjax.layers import attention
from gemjax.models.gem import Gem

DOMAINS = 3
CONFIG = c.Gem(
  layers=3, fmb_units=4, lcb_units=4, rank=3, mlp=(7,), width=2, memory_units=2, strides=(1, 3),
  fine=c.Attention(heads=2, block=4, rope=50.0, qk_norm=True),
  coarse=c.Attention(heads=1, rope=20.0, qk_norm=True, time_buckets=33),
  cls=2, sum_mlp=True, cross=True, interest=5, pma=1, recent=3, gating="tanh", domain="surface",
  head=(6,),
)  # fmt: skip


class Branch:
  """One history at one resolution, for one example."""

  def __init__(self, config, spec, stride, s, age, candidate):
    self.candidate, self.stride, self.length = candidate, stride, -(-spec.length // stride)
    self.s, self.age = (s, age) if stride == 1 else coarsen(s, age, stride)
    self.attention = config.fine if stride == 1 else config.coarse


def summed(config, x, w):
  """X_sum."""
  return unit_summary(x, w, config.gating, cls=config.cls, mlp=config.sum_mlp)


def said(config, branches, x_sum, w):
  """S_sum: what leaves the branches."""
  parts = []
  for b, branch in enumerate(branches):
    of = w.get("sequences", {}).get(b, {})  # Nothing is learnt where only newest events leave.
    asked = [x_sum] * config.cross + [branch.candidate] * config.target
    queries = np.concatenate(asked) if asked else None
    counts = {"pma": config.pma, "recent": config.recent if branch.stride == 1 else 0}
    parts.append(
      sequence_summary(branch.s, branch.age, of, config.coarse, queries=queries, **counts)
    )
  return gating(np.concatenate(parts), w.get("gate"), config.gating)


def layer(config, branches, x, memories, w):
  """X and the branches' S follow from the layer's inputs."""
  x_sum = summed(config, x, w["units"]) if "units" in w else None
  inputs = [x]
  if branches and config.exchange:
    inputs.append(said(config, branches, x_sum, w["summary"]))
  if config.memory_units:
    memories.append(layer_norm(over_units(x, w["memory"]["compress"]), w["memory"]["norm"]))
    inputs.append(remembered(x_sum, memories, w["memory"]))
  fmb_units = config.fmb_units // config.width
  blocks = [wukong_layer(np.concatenate(inputs), of, fmb_units) for of in w["blocks"].values()]
  for b, branch in enumerate(branches):
    s, of = branch.s, w["branches"][b]
    if config.exchange and config.personalised:
      s = s + personalised(layer_norm(s, of["norm"]), x_sum, of["personal"])
    if config.cell == "hstu":
      branch.s = hstu(s, branch.age, of["cell"], branch.attention, branch.length)
    else:
      branch.s = transformer(s, branch.age, of["cell"], branch.attention, causal=True)
  return np.concatenate(blocks)


def oracle(config, w, x, histories, domain_B=None):
  branches = []
  interests = []
  candidates = []
  for i, (units, age) in enumerate(histories if config.strides or config.interest else ()):
    s = event_tokens(units, age, w["events"][i])
    candidate = candidate_token(x, SPECS[i].candidate, w["events"][i])
    candidates.append(candidate)
    if config.interest:
      assert len(w["interests"][i]["weigh"]["layers"][0]["bias"]) == config.interest
      interests.append(interest(s, candidate[0], w["interests"][i], mean=True)[None])
    if config.next_event:
      if config.cell == "hstu":
        s = hstu(s, age, w["fronts"][i], config.fine, SPECS[i].length)
      else:
        s = transformer(s, age, w["fronts"][i], config.fine, causal=True)
    branches += [Branch(config, SPECS[i], stride, s, age, candidate) for stride in config.strides]
  x = np.concatenate([x, *interests])
  memories = [over_units(x, w["memory"])] if config.memory_units else []
  assert all(len(m) == config.memory_units for m in memories)
  skipped = [x, *candidates] if config.skip else []
  x = wukong_layer(x, w["first"], config.fmb_units)
  for i in range(config.layers):
    of = jax.tree.map(lambda p, i=i: p[i], w["layers"])
    x = layer(config, branches, x, memories, of)
  told = [x]
  if branches:
    x_sum = summed(config, x, w["units"]) if config.cross else None
    told.append(said(config, branches, x_sum, w["summary"]))
  told = np.concatenate(told)
  told = told * w["gain_ND"] if config.skip else told
  x, domain, of = np.concatenate([*skipped, told]).reshape(-1), domain_B, w["heads"]
  if domain is None:
    return heads(x, of["heads"])
  own = jax.tree.map(lambda rows: rows[domain], {n: of[n] for n in of if n != "heads"})
  x = x * (1 + own["gain_KI"]) + own["shift_KI"]
  # Each task's last layer is that of all domains plus the domain's own.
  tasks = {}
  for t, task in of["heads"]["heads"].items():
    layers = dict(task["layers"])
    last = layers[len(layers) - 1]
    layers[len(layers) - 1] = {
      "kernel": last["kernel"] + own["weights_KH"][t][:, None],
      "bias": last["bias"] + own["bias_KT"][t],
    }
    tasks[t] = {"layers": layers}
  return heads(x, {"heads": tasks})


def case(config, histories):
  domains = DOMAINS if config.domain else 0
  make = maker(Gem, config, histories, domains=domains)
  more = {"domain_B": np.arange(B, dtype=np.int32) % DOMAINS} if domains else {}
  one = lambda *args, **more: oracle(config, *args, **more)
  return Case(make, one, histories=histories, **more)


@pytest.fixture(scope="module")
def whole():
  return case(CONFIG, 1)


def test_formulas(whole):
  whole.check_all()


def test_layers_say_nothing_at_birth(whole):
  """At first the head reads what DIN reads, and learns how far to listen to the layers."""
  born = copy.copy(whole)
  make = maker(Gem, CONFIG, 1, domains=DOMAINS)
  params_of = lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param))
  born.params = jax.tree.map(np.asarray, jax.jit(params_of, compiler_options=FAST)())
  params, _, _ = born.gradients(np.ones((B, T), np.float32))
  silent = {name for name in params if not any(g.any() for g in jax.tree.leaves(params[name]))}
  assert silent == {"first", "layers", "memory", "summary", "units"}


def test_a_domain_learns_from_its_own_examples(whole):
  for domain in range(DOMAINS):
    own = whole.more["domain_B"] == domain
    params, _, _ = whole.gradients(np.tile(own[:, None], T).astype(np.float32))
    of = params["heads"]
    assert all(g.any() for g in jax.tree.leaves(of.pop("heads")))
    assert len(jax.tree.leaves(of)) == 3 + T
    for k in range(DOMAINS):
      assert all(g[k].any() == (k == domain) for g in jax.tree.leaves(of))


@pytest.fixture
def quickly_compiled(monkeypatch):
  """Attention by its formula, whose program is small; the others are compared elsewhere."""
  formula = functools.partial(attention.jagged_attention, implementation="reference")
  monkeypatch.setattr(attention, "jagged_attention", formula)


def test_two_histories(quickly_compiled):
  case(CONFIG, 2).check_forward()


SWITCHES = {  # What is switched, and which parameters go with it.
  "exchange": ({"exchange": False}, r"layers\.(summary|branches\.\d\.(norm|personal))\."),
  "personalised": ({"personalised": False}, r"layers\.branches\.\d\.(norm|personal)\."),
  "cross": ({"cross": False}, r"units\."),
  "sum_mlp": ({"sum_mlp": False}, r"(layers\.)?units\.(hidden\.|compress\.bias_L)"),
  "target": ({"target": False}, "none"),
  "gating": ({"gating": "none"}, r"(layers\.)?(units|summary)\.gate\."),
  "skip": ({"skip": False}, "gain_ND"),
  "pma": ({"pma": 0}, r"(layers\.)?summary\.sequences\.\d\.pool\.seeds_MD"),
  "recent": ({"recent": 0}, "none"),
  "interest": ({"interest": 0}, r"interests\."),
  "all but recent": (
    {"cross": False, "target": False, "pma": 0, "strides": (1,)},
    r"units\.|(layers\.)?summary\.sequences\.|layers\.branches\.1\.",
  ),
  "memory": ({"memory_units": 0}, r"(layers\.)?memory\."),
  "width": ({"width": 1}, r"layers\.blocks\.1\."),
  "coarse branch": (
    {"strides": (1,)},
    r"(layers\.)?summary\.sequences\.1\.|layers\.branches\.1\.",
  ),
  "towers": ({"strides": ()}, r"units\.|(layers\.)?summary\.|layers\.branches\."),
  "histories": (
    {"strides": (), "interest": 0},
    r"events\.|interests\.|units\.|(layers\.)?summary\.|layers\.branches\.",
  ),
  "exchange and memory": (
    {"exchange": False, "memory_units": 0},
    r"layers\.(summary|units|branches\.\d\.(norm|personal))\.|(layers\.)?memory\.",
  ),
  "domain": ({"domain": ""}, r"heads\.(gain_KI|shift_KI|weights_KH|bias_KT)"),
}


def names(params):
  paths = jax.tree_util.tree_leaves_with_path(params)
  return {".".join(str(key.key) for key in path) for path, _ in paths}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_part_is_switched_off(quickly_compiled, whole, name):
  """What is left follows the formulas; gone are the part's parameters and no others."""
  changes, part = SWITCHES[name]
  off = case(dataclasses.replace(CONFIG, **changes), 1)
  before, after = names(whole.params), names(off.params)
  assert before - after == {n for n in before if re.match(part, n)} and not after - before
  off.check_forward()


def test_hstu_cells_one_in_front_and_plain_products(quickly_compiled):
  case(dataclasses.replace(CONFIG, cell="hstu", next_event=0.1, fm="basic"), 1).check_forward()


@pytest.mark.parametrize("strides", [(1, 3), (3,)])
def test_a_branch_that_nothing_leaves_is_refused(strides):
  model = dataclasses.replace(CONFIG, cross=False, target=False, pma=0, strides=strides)
  law = r"config\.model\.strides is .*, but must be \(\), or \(1,\) with recent, where"
  with pytest.raises(c.ConfigError, match=law):
    c.Config(name="x", model=model).validate()
  c.Config(name="x", model=dataclasses.replace(model, strides=(1,))).validate()


@pytest.mark.parametrize(
  ("field", "changes"),
  [
    ("recent", {"strides": (3,)}),
    ("gain", {"skip": False, "gain": 1.0}),
    ("next_event", {"strides": (), "next_event": 0.1}),
  ],
)
def test_a_number_that_nothing_reads_is_refused(field, changes):
  c.Config(name="x", model=CONFIG).validate()
  with pytest.raises(c.ConfigError, match=rf"config\.model\.{field} is .*, but must be 0 "):
    c.Config(name="x", model=dataclasses.replace(CONFIG, **changes)).validate()
