"""Pallas GPU kernels for jagged user sequences; needs jax alone.

A jagged array holds sequences side by side, without padding: rows [offsets[s], offsets[s + 1]) are
those of segment s. Every op has a kernel for NVIDIA GPUs, an efficient form in plain JAX that runs
elsewhere, and a reference; see dispatch.py for which one runs. What is public is named here: an
op's folder is hidden behind its function of the same name; `from <folder> import` reaches in.

Inside `jax.shard_map` take check_vma=False, as for any Pallas kernel whose outputs name no axes.

    python -m pallas_kernels.report     what the compilers make of every kernel, without a GPU
    python -m pallas_kernels.bench      what is needed, what is visited, and times
"""

from pallas_kernels.dispatch import Refused as Refused
from pallas_kernels.embedding_bag.api import embedding_bag as embedding_bag
from pallas_kernels.embedding_bag.api import embedding_bag_gradients as embedding_bag_gradients
from pallas_kernels.fm_interaction.api import fm_interaction as fm_interaction
from pallas_kernels.jagged_attention.api import jagged_attention as jagged_attention
from pallas_kernels.jagged_attention.bias import Buckets as Buckets
from pallas_kernels.jagged_attention.bias import LinearBuckets as LinearBuckets
from pallas_kernels.jagged_attention.bias import LogBuckets as LogBuckets
from pallas_kernels.jagged_attention.bias import RelativeBias as RelativeBias
from pallas_kernels.jagged_concat.api import jagged_concat as jagged_concat
from pallas_kernels.jagged_dense.api import dense_to_jagged as dense_to_jagged
from pallas_kernels.jagged_dense.api import jagged_to_dense as jagged_to_dense
from pallas_kernels.jagged_matmul.api import jagged_matmul as jagged_matmul
from pallas_kernels.jagged_pool.api import jagged_pool as jagged_pool
from pallas_kernels.quantize_fp8.api import dequantize_fp8 as dequantize_fp8
from pallas_kernels.quantize_fp8.api import quantize_fp8 as quantize_fp8
from pallas_kernels.rows import take_rows as take_rows
from pallas_kernels.rowwise_adagrad.api import rowwise_adagrad_update as rowwise_adagrad_update
from pallas_kernels.rowwise_adagrad.runs import sorted_runs as sorted_runs
from pallas_kernels.sum_runs.api import sum_runs as sum_runs
