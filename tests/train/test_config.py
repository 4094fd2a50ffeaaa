"""Configs: laws, comparison, JSON. Cases of single fields: tests/end_to_end/test_bad_input.py."""

import dataclasses
import json
import typing

import pytest

from gemjax import config as c
from gemjax import fields

KINDS = typing.get_args(c.Model)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_valid_and_json_there_and_back_is_the_same(kind):
  config = c.Config(name="x", model=kind())
  config.embedding.units, config.train.task_weights = {"user": 2}, {"click": 0.5}
  config.validate()
  assert c.Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_every_field_has_a_type_that_can_be_checked_and_compared():
  """A new field of another type must first be taught to gemjax/fields.py."""

  def walk(kind):
    for field in dataclasses.fields(kind):
      if field.type not in fields._PLAIN:
        for inner in typing.get_args(field.type) or (field.type,):
          assert dataclasses.is_dataclass(inner), field
          walk(inner)

  walk(c.Config)


def numbers(config, prefix=""):
  """Yields (path, holder, name) of every number and text of a config."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from numbers(value, f"{prefix}{field.name}.")
    elif isinstance(value, int | float | str):
      yield prefix + field.name, config, field.name


@pytest.mark.parametrize("path", [p for p, _, _ in numbers(c.Config(name="x"))])
def test_any_field_of_another_type_is_refused_and_any_change_is_seen(path):
  config = c.Config(name="x")
  before = config.to_json()
  holder, name = next((h, n) for p, h, n in numbers(config) if p == path)
  value = getattr(holder, name)
  flag = isinstance(value, bool)
  for wrong in (None, [], 1 if flag else True, object, b"x", {"a": 1}):
    setattr(holder, name, wrong)
    with pytest.raises(c.ConfigError, match=f"^config.{path} is .*, but must be "):
      config.validate()
  setattr(holder, name, not value if flag else value + ("x" if isinstance(value, str) else 1))
  found = c.difference(before, config.to_json())
  if path in c.FREE_ON_RESUME:
    assert found is None
  else:
    assert found == f"config.{path} was {value!r} and is now {getattr(holder, name)!r}"


@pytest.mark.parametrize("local, every", [("/dev/shm/x", 0), ("", 5), ("/dev/shm/x", -5)])
def test_snapshots_want_a_folder_and_steps(local, every):
  config = c.Config(name="x", checkpoint=c.Checkpoint(local=local, local_every=every))
  with pytest.raises(
    c.ConfigError, match=f"^config.checkpoint.local_every is {every}, but must be"
  ):
    config.validate()


def test_free_fields_exist():
  assert set(c.FREE_ON_RESUME) <= {p for p, _, _ in numbers(c.Config(name="x"))}


def test_differences_in_dicts_and_kinds():
  a, b = c.Config(name="x").to_json(), c.Config(name="y").to_json()
  assert c.difference(a, b) is None
  b["embedding"]["units"] = {"user": 2}
  assert c.difference(a, b) == "config.embedding.units was {} and is now {'user': 2}"
  a["embedding"]["units"] = {"user": 2, "ad": 3}
  assert c.difference(a, b) == "config.embedding.units.ad was 3 and is now None"
  b = c.Config(name="x", model=c.Mlp()).to_json()
  a["embedding"]["units"] = {}
  assert "model.kind was 'Wukong' and is now 'Mlp'" in c.difference(a, b)


@pytest.mark.parametrize(
  "tree, words",
  [
    ([], "config is []"),
    ({}, "lacks a field"),
    ({"name": "x", "train": 3}, "config.train is 3"),
    (
      {"name": "x", "train": {"sead": 3}},
      "config.train.sead does not exist; the fields are epochs",
    ),
    ({"name": "x", "model": {"kind": "Gpt"}}, "config.model.kind is 'Gpt', but must be one of Wuk"),
    ({"name": "x", "model": {"layers": 2}}, "config.model.kind is None"),
    ({"name": "x", "model": {"kind": "Mlp", "rank": 1}}, "config.model.rank does not exist"),
    ({"name": "x", "train": {"seed": "0"}}, "config.train.seed is '0'"),
    ({"name": "x", "model": {"kind": "Mlp", "head": [8, "9"]}}, "config.model.head is (8, '9')"),
  ],
)
def test_json_that_is_no_config(tree, words):
  with pytest.raises(c.ConfigError) as caught:
    c.Config.from_json(tree)
  assert words in str(caught.value)


def test_absent_fields_keep_their_defaults():
  assert c.Config.from_json({"name": "x"}) == c.Config(name="x")
