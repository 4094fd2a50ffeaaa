"""Processes that hold the same rows read them once between them."""

import math

import jax
import pytest
import replicas
import side_by_side
from jax.sharding import NamedSharding, PartitionSpec

from gemjax.checkpoint.replicas import divided
from gemjax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("replicas") / "checkpoints"
  replicas.save(folder)
  return folder


def restored(folder, count, fault="none") -> list[tuple[int, str, str]]:
  alone = {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
  return side_by_side.ended("replicas.py", folder, count, FAULT=fault, **alone)


def test_each_reads_its_part(folder):
  ended = restored(folder, 2)
  assert [code for code, *_ in ended] == [0, 0], ended
  share = [int(out.splitlines()[-1]) / 4 / math.prod(replicas.SHAPE) for _, out, _ in ended]
  print(f"read by each: {', '.join(f'{x:.3f}' for x in share)} of the array that both hold")
  assert all(0.5 <= x < 0.51 for x in share), share


def test_one_that_cannot_read_ends_all(folder):
  for code, out, err in restored(folder, 2, fault="1"):
    assert code == 1, err
    assert "could not be read (the cable is out); mend that, then the same command" in out


@pytest.mark.parametrize("mesh, parts", [((1, 4), 4), ((2, 2), 4), ((4, 1), 4)])
def test_what_is_copied_is_divided_and_nothing_else(mesh, parts, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  sharding = NamedSharding(make_mesh(*mesh, jax.devices()[:4]), PartitionSpec("model"))
  like = jax.ShapeDtypeStruct(replicas.SHAPE, "float32", sharding=sharding)
  found = divided({"table": like})["table"]
  assert found.sharding.shard_shape(like.shape)[0] == like.shape[0] // parts
  assert (found is like) == (mesh[0] == 1)  # Else completing it would be a copy of all.
