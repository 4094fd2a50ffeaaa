"""Every test process has eight CPU devices, so that meshes of any shape can be tried in it.

With JAX_PLATFORMS=cuda it has the GPUs instead, on which the kernels are no longer interpreted:
`JAX_PLATFORMS=cuda python -m pytest tests/pallas_kernels`.
"""

import gc
import os

# Before JAX is first used. With the CUDA wheels and no driver, JAX would print a traceback.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import compiled_quickly

# XLA reads this once, with the first backend; what compiles for GPUs shall do it as users do.
_FLAGS = os.environ.get("XLA_FLAGS")
if compiled_quickly.ON_GPU:
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # Several processes share it.
else:
  os.environ["XLA_FLAGS"] = f"{compiled_quickly.XLA_FLAGS} {_FLAGS or ''}"

import jax  # noqa: E402

# Tracing makes millions of objects that stay: a tenth of all time was looking through them.
gc.set_threshold(200_000, 100, 100)
jax.config.update("jax_num_cpu_devices", 8)
if compiled_quickly.ON_GPU:
  jax.config.update("jax_default_matmul_precision", "highest")  # Of XLA; else TF32.
jax.devices()
if _FLAGS is None:
  os.environ.pop("XLA_FLAGS", None)
else:
  os.environ["XLA_FLAGS"] = _FLAGS
