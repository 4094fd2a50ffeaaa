"""Groups that update tables of their own and average them now and then, through the whole loop."""

import dataclasses

import pytest

from gemjax import config as c
from gemjax.checkpoint import Checkpoints
from gemjax.train import loop
from gemjax.train.loop import train
from gemjax.train.programs import Programs
from gemjax.train.termination import Terminated
from gemjax.train.trained import evaluate_run
from gemjax.train.workdir import CHECKPOINTS, WorkdirError


@pytest.fixture
def averaged(config):
  config.mesh = c.Mesh(data=2, model=2)
  config.embedding = dataclasses.replace(
    config.embedding, replicas="average", average_every=5, replicated_rows=0
  )
  config.checkpoint = c.Checkpoint(every=3, keep=100)
  return config


@pytest.mark.slow
def test_evaluation_and_checkpoints_wait_for_an_average_and_a_stop_loses_nothing(
  averaged, tmp_path, monkeypatch
):
  summary = train(averaged, tmp_path / "whole")
  steps = Checkpoints(tmp_path / "whole" / CHECKPOINTS, read_only=True).steps
  end = summary["train"]["steps"]
  assert steps == [*range(5, end, 5), end] and end % 5
  with monkeypatch.context() as patch:
    patch.setattr(loop._Run, "_stop_requested", lambda self, done: done >= 12)
    with pytest.raises(Terminated, match="after step 15"):
      train(averaged, tmp_path / "stopped")
  again = train(averaged, tmp_path / "stopped")
  for split in ("valid", "test"):
    assert again[split] == summary[split]
  found = evaluate_run(tmp_path / "whole", "test").results
  assert found["click"]["auc"] == pytest.approx(summary["test"]["auc"], abs=1e-6)


def test_every_step_may_end_with_an_average(averaged, tmp_path, monkeypatch):
  averaged.embedding.average_every, averaged.train.steps = 1, 4
  calls, average = [], Programs.average
  monkeypatch.setattr(Programs, "average", lambda *args: calls.append(0) or average(*args))
  train(averaged, tmp_path / "run")
  assert len(calls) == 4


@pytest.mark.slow
def test_another_number_of_groups_is_another_algorithm(averaged, tmp_path):
  averaged.train.steps = 5
  train(averaged, tmp_path / "run")
  averaged.mesh = c.Mesh(data=4, model=2)
  with pytest.raises(WorkdirError, match=r"config.mesh.data was 2 and is now 4"):
    train(averaged, tmp_path / "run")
  averaged.mesh = c.Mesh()
  with pytest.raises(c.ConfigError, match=r"config.mesh.data is 0, but must be positive"):
    train(averaged, tmp_path / "other")


def test_a_run_is_evaluated_on_fewer_devices_and_on_numbers_that_do_not_divide(
  config, tmp_path, monkeypatch
):
  config.mesh, config.train.steps = c.Mesh(model=8), 8
  test = train(config, tmp_path / "run")["test"]
  import jax

  for count in (1, 3):
    monkeypatch.setattr(jax, "devices", lambda n=count: jax.local_devices()[:n])
    monkeypatch.setattr(jax, "device_count", lambda n=count: n)
    found = evaluate_run(tmp_path / "run", "test").results
    assert found["click"]["log_loss"] == pytest.approx(test["log_loss"], rel=1e-5)
