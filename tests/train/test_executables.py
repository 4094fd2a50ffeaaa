"""By what an executable is asked for."""

import jax

from gemjax.config import Config
from gemjax.features import FeatureSet, Sparse
from gemjax.train.executables import origin_of


def test_a_profile_that_changes_under_its_name_is_another_program(tmp_path, monkeypatch):
  profile = tmp_path / "profile.pbtxt"
  many = ",".join(f"pass-{i}" for i in range(99))  # Longer than a file's name may be.
  flags = f"--xla_passes_in_profile={many} --xla_profile={profile} --xla_b={tmp_path}/absent"
  monkeypatch.setenv("XLA_FLAGS", flags)
  profile.write_text("costs { name: 'fusion' cost_us: 1 }")
  first = origin()
  assert origin() == first
  profile.write_text("costs { name: 'fusion' cost_us: 2 }")
  changed = origin()
  assert {name for name in first if first[name] != changed[name]} == {"files"}


def test_what_xla_writes_is_no_part_of_the_name(tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_dump_autotune_results_to={tmp_path}/found.txt")
  first = origin()
  (tmp_path / "found.txt").write_text("autotuned")
  assert origin() == first


def test_what_is_free_to_change_but_shapes_a_program_is_part_of_the_origin():
  changed = [Config(name="x") for _ in range(5)]
  changed[1].memory.recomputed_layers = 1
  changed[2].memory.activation_budget = 0.5
  changed[3].compilation.unroll = 2
  changed[4].compilation.early_sums = True
  first, *others = (origin(config) for config in changed)
  assert all(other != first for other in others)
  moved = Config(name="y")
  moved.compilation.cache = "elsewhere"
  assert origin(moved) == first


def origin(config=None):
  features = FeatureSet(sparse=(Sparse(name="ad", table="ad", size=9),))
  mesh = jax.make_mesh((1, 1), ("data", "model"))
  return origin_of(config or Config(name="x"), features, 10, mesh)
