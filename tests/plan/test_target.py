"""Topologies, the environment of a planning process, and what stands in its way."""

import subprocess
import sys

import pytest

from gemjax.plan import target


def test_a_topology_is_read():
  found = target.parse_topology("h100:16x8")
  assert (found.target.name, found.hosts, found.gpus_per_host, found.size) == ("h100", 16, 8, 128)


@pytest.mark.parametrize(
  "text, says",
  [
    ("h100", "must read <gpu>:<hosts>x<gpus of a host>"),
    ("h100:16x8x1", "must read"),
    ("h100:16x-8", "must read"),
    ("v100:1x8", "GPU 'v100' is not one of a100, h100, h200, b200"),
    ("h100:0x8", "at least one host"),
  ],
)
def test_a_bad_topology_is_refused_in_one_sentence(text, says):
  with pytest.raises(target.PlanError, match=says) as error:
    target.parse_topology(text)
  assert text in str(error.value) and "\n" not in str(error.value)


def test_the_environment_keeps_the_users_flags_and_lets_them_win(monkeypatch, tmp_path):
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false --mine=1")
  monkeypatch.setenv("OTHER", "kept")
  found = target.environment(tmp_path)
  flags = found["XLA_FLAGS"].split()
  assert flags[-2:] == ["--xla_gpu_enable_latency_hiding_scheduler=false", "--mine=1"]
  assert {*target.REQUIRED_FLAGS, f"--xla_dump_to={tmp_path}"} <= {*flags}
  assert (found["JAX_PLATFORMS"], found["OTHER"]) == ("cpu", "kept")
  assert found["JAX_ENABLE_COMPILATION_CACHE"] == "false"
  assert "--xla_dump_to" not in target.environment()["XLA_FLAGS"]


def test_a_dump_folder_with_a_space_is_refused():
  with pytest.raises(target.PlanError, match="has a space"):
    target.environment("/a b")


def test_what_stands_in_the_way_is_told(monkeypatch):
  monkeypatch.setattr(target, "has_cuda_wheels", lambda: False)
  assert "CUDA wheels" in target.obstacle()
  monkeypatch.setattr(target, "has_cuda_wheels", lambda: True)
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
  assert "'--xla_gpu_enable_triton_gemm=false' before JAX is imported" in target.obstacle()
  with pytest.raises(target.PlanError, match="before JAX is imported"):
    target.devices(target.parse_topology("h100:1x1"))
  monkeypatch.setenv("XLA_FLAGS", " ".join(target.REQUIRED_FLAGS))
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  assert "JAX_PLATFORMS=cpu" in target.obstacle()
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert target.obstacle() is None


def test_all_but_compiling_starts_no_backend():
  """XLA reads its flags once, when the first backend starts."""
  code = (
    "import jax._src.xla_bridge; from gemjax.plan import collectives, hlo, memory, target;"
    "target.environment(); assert not jax._src.xla_bridge.backends_are_initialized()"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_arguments_that_are_on_no_mesh_and_donation_without_effect_are_refused():
  import jax
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from gemjax.plan.compile import compile_for

  with pytest.raises(target.PlanError, match="lie on 0 meshes"):
    compile_for(lambda x: x, (jax.ShapeDtypeStruct((8,), "float32"),))
  mesh = Mesh(jax.devices()[:1], ("data",))
  x = jax.ShapeDtypeStruct((8,), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
  with pytest.raises(target.PlanError, match="give it to jax"):
    compile_for(jax.jit(lambda x: x), (x,), donate=0)
