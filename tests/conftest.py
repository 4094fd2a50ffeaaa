"""Every test process has eight CPU devices, so that meshes of any shape can be tried in it."""

import os

# Before JAX is first used. With the CUDA wheels and no driver, JAX would print a traceback.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests compile many small programs and run each a few times.
os.environ.setdefault(
  "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
