"""One data set and one trained run for all tests of this folder."""

import pytest
import small
from runs import config_of

from gemjax.train.loop import train


@pytest.fixture(scope="session")
def data(tmp_path_factory):
  """A prepared folder; read only."""
  return small.write_data(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, data):
  """A finished run that shrinks its rows, which are bfloat16, and has scanned layers; read only."""
  run = tmp_path_factory.mktemp("trained") / "run"
  embedding = {"l2": 0.1, "dtype": "bfloat16", "learning_rate": 0.3, "init_scale": 0.3}
  train(config_of("gemjax", data, embedding), run)
  return run
