"""Laws of models that read histories, and light variants."""

import dataclasses
import pathlib
import runpy

import pytest

from gemjax import config as c
from gemjax.features import EventColumn, FeatureSet, History, Sparse
from gemjax.train.source import open_data
from gemjax.train.state import make_trainer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
  ("model", "sentence"),
  [
    (c.Gem(fine=c.Attention(heads=3)), r"model\.fine\.heads is 3, but must be a divisor of .* 16"),
    (c.Sasrec(attention=c.Attention(heads=0)), r"model\.attention\.heads is 0"),
    (c.InterFormer(attention=c.Attention(heads=16, rope=1e4)), r"rope is .* width, 1, is odd"),
    (c.Hstu(attention=c.Attention(block=64)), r"model\.attention\.block is 64, but must be"),
    (c.Gem(strides=(1, 1)), r"model\.strides is \(1, 1\)"),
    (c.Gem(width=3), r"model\.fmb_units is 16, but must be divisible by config\.model\.width"),
    (c.Gem(memory_units=99), r"model\.memory_units is 99, but must be at most the 32 units"),
    (c.InterFormer(gating="none"), r"model\.gating is 'none'"),
    (c.Din(hidden=(0,)), r"model\.hidden is \(0,\)"),
    (c.Gem(layers=0), r"model\.layers is 0"),
    (
      c.InterFormer(attention=c.Attention(block=64)),
      r"model\.attention\.block is 64, but must be 0",
    ),
    (
      c.InterFormer(attention=c.Attention(window=9)),
      r"model\.attention\.window is 9, but must be 0",
    ),
    (c.Gem(cell="gru"), r"model\.cell is 'gru'"),
  ],
)
def test_a_model_outside_its_laws_is_refused_by_its_field(model, sentence):
  with pytest.raises(c.ConfigError, match=sentence):
    c.Config(name="x", model=model).validate()


AD = Sparse(name="ad", size=9, table="ad")
CLICKS = History(name="clicks", max_length=5, columns=(EventColumn(name="ad", size=9, table="ad"),))
APART = dataclasses.replace(CLICKS, columns=(EventColumn(name="ad", size=9, table="own"),))


@pytest.mark.parametrize(
  ("model", "features", "length", "sentence"),
  [
    (
      c.Gem(),
      FeatureSet(sparse=(AD,)),
      0,
      r"model is Gem, .* data have none",
    ),
    (
      c.Din(),
      FeatureSet(sparse=(AD,)),
      0,
      r"model is Din, .* data have none",
    ),
    (c.Gem(), FeatureSet(sparse=(AD,), history=(APART,)), 0, "history 'clicks' .* shares a table"),
    (c.Hstu(), FeatureSet(sparse=(AD,), history=(APART,)), 0, "history 'clicks' .* shares a table"),
    (c.InterFormer(), FeatureSet(sparse=(AD,), history=(APART,)), 0, "need two units .*, not 1"),
    (c.Gem(), FeatureSet(sparse=(AD,), history=(CLICKS,)), 6, "history is 6, .* keep 5 events at"),
  ],
)
def test_data_that_leave_a_model_blind_are_refused(model, features, length, sentence):
  config = c.Config(name="x", model=model, data=c.Data(history=length))
  with pytest.raises(c.ConfigError, match=sentence):
    make_trainer(config, features, steps=1)


def test_a_model_that_asks_with_no_candidate_takes_a_history_of_its_own_tables():
  features = FeatureSet(sparse=(AD,), history=(APART,))
  model = c.Gem(layers=1, strides=(1,), target=False, interest=0)
  make_trainer(c.Config(name="x", model=model), features, steps=1)


def test_a_config_for_planning_says_so(tmp_path):
  config = c.Config(name="x", data=c.Data(path="none: for planning"))
  with pytest.raises(c.ConfigError, match=r"config\.data\.path .* is for launch/plan"):
    open_data(config, tmp_path)


@pytest.mark.parametrize(
  "name", ["gem_demo", "gem_movielens", "gem_small", "gem_base", "gem_large"]
)
def test_light_variants_are_valid_and_keep_the_shape(name):
  make = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]
  full, light = make(), make("light")
  full.validate()
  light.validate()
  assert light.name == f"{full.name}_light"
  assert light.embedding.dim == full.embedding.dim // 4
  for field in dataclasses.fields(full.model):
    a, b = getattr(full.model, field.name), getattr(light.model, field.name)
    if field.name in ("mlp", "head"):
      assert b == tuple(width // 4 for width in a)
    elif field.name == "interest":
      assert b == a // 4
    elif isinstance(a, c.Attention):
      assert dataclasses.replace(b, heads=a.heads) == a and b.heads == max(1, a.heads // 4)
    else:
      assert a == b, field.name
  with pytest.raises(c.ConfigError, match=r"variant 'lihgt' is n"):
    make("lihgt")


def test_every_ranker_of_the_comparison_is_valid_and_one_of_its_own():
  file = runpy.run_path(str(CONFIGS / "gem_movielens.py"))
  configs = [file["get_config"](name) for name in (*file["MODELS"], *file["ABLATIONS"])]
  for config in configs:
    config.validate()
  models = [str(config.model) for config in configs]
  assert len(set(models)) == len(models)
  sections = [id(a) for config in configs for a in vars_of(config.model)]
  assert len(set(sections)) == len(sections)


def vars_of(model):
  values = (getattr(model, f.name) for f in dataclasses.fields(model))
  return [v for v in values if isinstance(v, c.Attention)]
