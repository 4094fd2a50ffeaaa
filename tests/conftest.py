"""Every test process has eight CPU devices, so that meshes of any shape can be tried in it."""

import os

# Before JAX is first used. With the CUDA wheels and no driver, JAX would print a traceback.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests compile many small programs and run each a few times. XLA reads this once, with the first
# backend; processes that a test starts shall compile as users' do.
_QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_FLAGS = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{_QUICKLY} {_FLAGS or ''}"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()
if _FLAGS is None:
  del os.environ["XLA_FLAGS"]
else:
  os.environ["XLA_FLAGS"] = _FLAGS


@pytest.fixture
def compiled_alike(monkeypatch):
  """Processes that the test starts give the bits of this one."""
  monkeypatch.setenv("XLA_FLAGS", _QUICKLY)
