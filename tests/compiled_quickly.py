"""Flags for programs that are compiled once and run a few times: three times as quick.

They are the CPU's. On a GPU (JAX_PLATFORMS=cuda) tests compile as users do.
"""

import os

ON_GPU = os.environ.get("JAX_PLATFORMS", "cpu").startswith("cuda")

XLA_FLAGS = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
