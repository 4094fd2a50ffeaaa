"""One data set and one trained run for all tests of this folder; compiled programs are shared."""

import functools
import os
import shutil

import jax
import pytest
import snapshotting
import tiny
from jax.experimental.compilation_cache import compilation_cache

from gemjax.train.loop import train


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  """Folder of compiled programs: a tiny run is 1 s of training and 10 s of compilation."""
  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
  folder.mkdir(exist_ok=True)  # All workers share it.
  return folder


@pytest.fixture(autouse=True)
def cached(cache):
  """This process reads and writes `cache`, too, but not in the tests of other folders."""
  options = {"JAX_COMPILATION_CACHE_DIR": str(cache)} | tiny.CACHE_ALL
  before = {name.lower(): getattr(jax.config, name.lower()) for name in options}
  after = {
    "jax_compilation_cache_dir": str(cache),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  for values in (after, before):
    compilation_cache.reset_cache()
    for name, value in values.items():
      jax.config.update(name, value)
    if values is after:
      yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
  """A prepared folder; read only."""
  return tiny.write_data(tmp_path_factory.mktemp("tiny") / "data").path


@pytest.fixture
def config(data):
  config = tiny.get_config()
  config.data.path = str(data)
  return config


@pytest.fixture(scope="session")
def _trained(tmp_path_factory):
  return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def trained(_trained, config, tmp_path):
  """A copy of the workdir of a finished run of `config`."""
  if not _trained.exists():
    train(config, _trained)
  return shutil.copytree(_trained, tmp_path / "run")


@pytest.fixture(scope="session")
def compiled(cache):
  """Nothing is even traced twice."""
  return cache / "snapshots"


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, data, compiled):
  """Finished runs by mesh; one process gives the bits of several."""

  @functools.cache
  def of(*mesh):
    folder = tmp_path_factory.mktemp("unbroken")
    train(snapshotting.few_checkpoints(data, compiled, folder / "local", mesh), folder / "run")
    assert not list((folder / "local").iterdir())
    return folder / "run"

  return of


@pytest.fixture
def local(tmp_path):
  return tmp_path / "local"


@pytest.fixture
def kept(data, compiled, local):
  return snapshotting.few_checkpoints(data, compiled, local)
