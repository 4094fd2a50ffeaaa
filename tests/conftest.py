"""Every test process has eight CPU devices, so that meshes of any shape can be tried in it."""

import os

# Before JAX is first used. With the CUDA wheels and no driver, JAX would print a traceback.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import compiled_quickly

# XLA reads this once, with the first backend; what compiles for GPUs shall do it as users do.
_FLAGS = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{compiled_quickly.XLA_FLAGS} {_FLAGS or ''}"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()
if _FLAGS is None:
  del os.environ["XLA_FLAGS"]
else:
  os.environ["XLA_FLAGS"] = _FLAGS
