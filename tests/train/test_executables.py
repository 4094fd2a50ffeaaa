"""By what an executable is asked for."""

import jax

from gemjax.config import Config
from gemjax.features import FeatureSet, Sparse
from gemjax.train.executables import origin_of


def test_a_profile_that_changes_under_its_name_is_another_program(tmp_path, monkeypatch):
  profile = tmp_path / "profile.pbtxt"
  monkeypatch.setenv("XLA_FLAGS", f"--xla_a=3 --xla_profile={profile} --xla_b={tmp_path}/absent")
  profile.write_text("costs { name: 'fusion' cost_us: 1 }")
  first = origin()
  assert origin() == first
  profile.write_text("costs { name: 'fusion' cost_us: 2 }")
  changed = origin()
  assert {name for name in first if first[name] != changed[name]} == {"files"}


def origin():
  features = FeatureSet(sparse=(Sparse(name="ad", table="ad", size=9),))
  mesh = jax.make_mesh((1, 1), ("data", "model"))
  return origin_of(Config(name="x"), features, 10, mesh)
