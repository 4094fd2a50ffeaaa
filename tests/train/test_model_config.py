"""Laws of models that read histories, and light variants."""

import dataclasses
import pathlib
import runpy

import pytest

from gemjax import config as c

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
  ("model", "sentence"),
  [
    (c.Gem(fine=c.Attention(heads=3)), r"model\.fine\.heads is 3, but must be a divisor of .* 16"),
    (c.Sasrec(attention=c.Attention(heads=0)), r"model\.attention\.heads is 0"),
    (c.InterFormer(attention=c.Attention(heads=16, rope=1e4)), r"rope is .* width, 1, is odd"),
    (c.Hstu(attention=c.Attention(block=64)), r"model\.attention\.block is 64, but must be 0"),
    (c.Gem(strides=(1, 1)), r"model\.strides is \(1, 1\)"),
    (c.Gem(width=3), r"model\.fmb_units is 16, but must be divisible by model\.width, 3"),
    (c.Gem(memory_units=99), r"model\.memory_units is 99, but must be at most the 32 units"),
    (c.InterFormer(gating="none"), r"model\.gating is 'none'"),
    (c.Din(hidden=(0,)), r"model\.hidden is \(0,\)"),
    (c.Gem(layers=0), r"model\.layers is 0"),
    (c.Gem(cell="gru"), r"model\.cell is 'gru'"),
  ],
)
def test_a_model_outside_its_laws_is_refused_by_its_field(model, sentence):
  with pytest.raises(c.ConfigError, match=sentence):
    c.Config(name="x", model=model).validate()


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
