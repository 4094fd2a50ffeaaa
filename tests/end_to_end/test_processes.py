"""Real processes on loopback train to the result of one."""

import json
import socket

import numpy as np
import pytest
import tiny

from gemjax.train.loop import train
from gemjax.train.trained import evaluate_run
from gemjax.train.workdir import SUMMARY

ROWS_SPLIT = {"config__embedding__replicated_rows": 0}  # Ids and rows really travel.


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def start_all(count, cache, env=None, **flags):
  address = f"127.0.0.1:{free_port()}"
  names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)} | (env or {})
  return [
    tiny.start("train", cache=cache, env=names | {"JAX_PROCESS_ID": str(i)}, **flags)
    for i in range(count)
  ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
  config = tiny.get_config()
  config.data.path, config.embedding.replicated_rows = str(data), 0
  config.embedding.dtype = "float32"
  return train(config, tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize(
  "mesh", [(1, 2), pytest.param((2, 1), marks=pytest.mark.slow)], ids=lambda m: f"{m[0]}x{m[1]}"
)
def test_two_processes_train_to_the_result_of_one(mesh, alone, data, cache, tmp_path):
  run = tmp_path / "run"
  flags = {"config": tiny.FILE, "workdir": run, "config__data__path": data} | ROWS_SPLIT
  flags |= {"config__mesh__data": mesh[0], "config__mesh__model": mesh[1]}
  # Stochastic rounding turns a last bit of a float32 into one of a bfloat16.
  flags |= {"config__embedding__dtype": "float32"}
  processes = start_all(2, cache, **flags)
  ended = [(*p.communicate(timeout=300), p.returncode) for p in processes]
  assert [code for _, _, code in ended] == [0, 0], ended
  assert f"mesh: data {mesh[0]} x model {mesh[1]}, 2 devices" in ended[0][0]
  assert "step" not in ended[1][0]  # One speaks for all.
  found = json.loads((run / SUMMARY).read_text())
  assert found["mesh"] == {"data": mesh[0], "model": mesh[1]}
  assert found["train"]["steps"] == alone["train"]["steps"]
  assert found["params"] == alone["params"]
  assert found["gflop_per_example"] == pytest.approx(alone["gflop_per_example"], 1e-3)
  np.testing.assert_allclose(found["train"]["loss"], alone["train"]["loss"], rtol=1e-4)
  for split in ("valid", "test"):
    for task, theirs in alone[split]["tasks"].items():
      ours = found[split]["tasks"][task]
      assert ours["examples"] == theirs["examples"]
      for metric in ("log_loss", "calibration"):
        np.testing.assert_allclose(ours[metric], theirs[metric], rtol=1e-3)
  # One process reads what two have saved.
  again = evaluate_run(run, "test").results
  for task, ours in again.items():
    np.testing.assert_allclose(
      ours["log_loss"], found["test"]["tasks"][task]["log_loss"], rtol=1e-6
    )


def test_half_a_set_of_variables_is_refused(data, tmp_path):
  process = tiny.start(
    "train", env={"JAX_NUM_PROCESSES": "2"}, config=tiny.FILE, workdir=tmp_path / "w"
  )
  error = tiny.sentence(process, 1)
  assert "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID" in error
