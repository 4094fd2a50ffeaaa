"""The rule that shapes the mesh."""

import pathlib
import runpy

import pytest

from gemjax import config as c
from gemjax.features import FeatureSet, Sparse
from gemjax.train.devices import shape_mesh

ROOT = pathlib.Path(__file__).parents[2]
H100 = 85_000_000_000


@pytest.fixture(scope="module")
def paper():
  file = runpy.run_path(ROOT / "configs/wukong_paper.py")
  return file["get_config"](), file["get_features"]()


def small():
  features = FeatureSet(sparse=(Sparse(name="a", size=10_000, table="a"),))
  return c.Config(name="small"), features


def shaped(experiment, devices, memory, **mesh):
  config, features = experiment
  config.mesh = c.Mesh(**mesh)
  data, model, lines = shape_mesh(config, features, devices, memory)
  return data, model, "\n".join(lines)


def test_a_small_model_is_replicated_on_every_device():
  data, model, lines = shaped(small(), 8, H100)
  assert (data, model) == (8, 1)
  assert "mesh: data 8 x model 1, 8 devices" in lines and "of 85 GB" in lines
  assert "1 row (more than 1,024 rows)" in lines


def test_a_large_one_is_split_over_the_fewest_devices_on_which_it_takes_half_the_memory(paper):
  # 627e9 * 2 bytes of tables: 39.2 GB a device of 32, 78.4 GB of 16.
  assert shaped(paper, 128, H100)[:2] == (4, 32)
  assert shaped(paper, 256, 2 * H100)[:2] == (16, 16)


def test_what_does_not_fit_is_split_over_all_and_says_so(paper):
  data, model, lines = shaped(paper, 8, H100)
  assert (data, model) == (1, 8) and "it may not fit" in lines


def test_rows_beyond_2_to_31_are_never_put_on_one_device(paper):
  assert shaped(paper, 8, None)[:2] == (4, 2)
  with pytest.raises(c.ConfigError, match=r"3,918,750,720 rows .* raise config.mesh.model above 1"):
    shaped(paper, 8, None, data=8)
  with pytest.raises(c.ConfigError, match="a device would hold"):
    shaped(paper, 1, None)


def test_sizes_that_tables_do_not_divide_by_are_passed_over():
  tight = 1_000_000  # Bytes: the 10,000 rows of 16 do not fit on one device.
  assert shaped(small(), 10, tight)[:2] == (5, 2)


def test_the_config_decides_and_the_other_size_follows():
  assert shaped(small(), 8, H100, model=4)[:2] == (2, 4)
  assert shaped(small(), 8, H100, data=2)[:2] == (2, 4)
  data, model, lines = shaped(small(), 8, H100, data=2, model=2)
  assert (data, model) == (2, 2) and "4 of 8 devices" in lines
  with pytest.raises(c.ConfigError, match=r"data 3 x model 4 = 12 devices, but there are 8"):
    shaped(small(), 8, H100, data=3, model=4)
