"""Processes that hold the same rows read them once between them."""

import math
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest
import replicas
from jax.sharding import NamedSharding, PartitionSpec

from gemjax.checkpoint.replicas import divided
from gemjax.parallel.mesh import make_mesh

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("replicas") / "checkpoints"
  replicas.save(folder)
  return folder


def restored(folder, count, fault="none") -> list[tuple[int, str, str]]:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  script = pathlib.Path(__file__).with_name("replicas.py")
  processes = [
    subprocess.Popen(
      [sys.executable, script, folder, address, str(count), str(index)],
      env=os.environ
      | {"PYTHONPATH": str(ROOT), "FAULT": fault, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"},
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for index in range(count)
  ]  # fmt: skip
  ended = [process.communicate(timeout=200) for process in processes]
  return [(p.returncode, out, err) for p, (out, err) in zip(processes, ended)]


def test_each_reads_its_part(folder):
  ended = restored(folder, 2)
  assert [code for code, *_ in ended] == [0, 0], ended
  share = [int(out.splitlines()[-1]) / 4 / math.prod(replicas.SHAPE) for _, out, _ in ended]
  print(f"read by each: {', '.join(f'{x:.3f}' for x in share)} of the array that both hold")
  assert all(0.5 <= x < 0.51 for x in share), share


def test_one_that_cannot_read_ends_all(folder):
  for code, out, err in restored(folder, 2, fault="1"):
    assert code == 1, err
    assert "is sound but could not be read (the cable is out); the same command tries again" in out


@pytest.mark.parametrize("mesh, parts", [((1, 4), 4), ((2, 2), 4), ((4, 1), 4)])
def test_what_is_copied_is_divided_and_nothing_else(mesh, parts, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  sharding = NamedSharding(make_mesh(*mesh, jax.devices()[:4]), PartitionSpec("model"))
  like = jax.ShapeDtypeStruct(replicas.SHAPE, "float32", sharding=sharding)
  found = divided({"table": like})["table"]
  assert found.sharding.shard_shape(like.shape)[0] == like.shape[0] // parts
  assert (found is like) == (mesh[0] == 1)  # Else completing it would be a copy of all.
