"""What a group of four warps does as one on Hopper, and the same for JAX's interpreter of kernels.

The interpreter of 0.10.2 has four gaps here, hence `Interpreted`: it binds layout_cast, plgpu.load
and run_state as if they were arithmetic (interpret/jaxpr_interpret.py:866), and its wgmma takes
neither registers nor transposed references (interpret/gpu_callbacks.py:1338 and 1358). A test tells
when they are closed.

Letters: B rows of the group (queries), K keys, D width, C columns of the output.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_ROWS = plgpu.Layout.WGMMA.reduce(1)  # Of numbers that belong to the rows of a product.


class Compiled:
  """Hopper's tensor cores and registers."""

  @staticmethod
  def columns(shape):
    """The number of the column, in each element."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)

  @staticmethod
  def full(shape, value):
    """float32, of a matrix or of its rows."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else _ROWS
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

  @staticmethod
  def row_terms(ref_B):
    """(B,) of shared memory, to lie with the rows of a product."""
    return plgpu.load(ref_B, (), layout=_ROWS, optimized=False)

  @staticmethod
  def matrix(ref_BC):
    return plgpu.load(ref_BC, (), layout=plgpu.Layout.WGMMA, optimized=False)

  @staticmethod
  def scores(q_BD, k_KD):
    """Both in shared memory."""

    def body(sum_BK):
      plgpu.wgmma(sum_BK, q_BD, plgpu.transpose_ref(k_KD, (1, 0)))
      return sum_BK[...]

    return pl.run_scoped(body, plgpu.ACC((q_BD.shape[0], k_KD.shape[0]), jnp.float32))

  @staticmethod
  def add_product(sum_BC, weight_BK, v_KC):
    """Only the values in shared memory."""
    return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, weight_BK, v_KC))(
      plgpu.ACC.init(sum_BC)
    )


class Interpreted:
  """The same on arrays that have no layout."""

  @staticmethod
  def columns(shape):
    return lax.broadcasted_iota(jnp.int32, shape, 1)

  @staticmethod
  def full(shape, value):
    return jnp.full(shape, value, jnp.float32)

  @staticmethod
  def row_terms(ref_B):
    return ref_B[...]

  @staticmethod
  def matrix(ref_BC):
    return ref_BC[...]

  @staticmethod
  def scores(q_BD, k_KD):
    return jnp.dot(q_BD[...], k_KD[...].T, preferred_element_type=jnp.float32)

  @staticmethod
  def add_product(sum_BC, weight_BK, v_KC):
    return sum_BC + jnp.dot(weight_BK, v_KC[...], preferred_element_type=jnp.float32)
