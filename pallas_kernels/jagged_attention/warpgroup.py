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

# Of numbers that belong to the rows, or to the columns, of a product.
_ROWS, _COLUMNS = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))


class Compiled:
  """Hopper's tensor cores and registers."""

  @staticmethod
  def numbers(shape, axis):
    """The number of the row (axis 0) or of the column, in each element."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

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
  def column_terms(ref_K):
    """(K,) of shared memory, to lie with the columns of a product."""
    return plgpu.load(ref_K, (), layout=_COLUMNS, optimized=False)

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

  @staticmethod
  def add_product_and_scores(sum_BC, weight_BK, y_KC, b_BC):
    """(sum + weight y, b y^T), of which both are waited for at once."""

    def body(refs):
      score_ref, sum_ref = refs
      plgpu.wgmma(score_ref, b_BC, plgpu.transpose_ref(y_KC, (1, 0)))
      plgpu.wgmma(sum_ref, weight_BK, y_KC)

    start = Compiled.full(weight_BK.shape, 0.0), sum_BC
    score_BK, sum_BC = pl.run_state(body)(tuple(map(plgpu.ACC.init, start)))
    return sum_BC, score_BK


class Interpreted:
  """The same on arrays that have no layout."""

  @staticmethod
  def numbers(shape, axis):
    return lax.broadcasted_iota(jnp.int32, shape, axis)

  @staticmethod
  def full(shape, value):
    return jnp.full(shape, value, jnp.float32)

  @staticmethod
  def row_terms(ref_B):
    return ref_B[...]

  column_terms = row_terms

  @staticmethod
  def matrix(ref_BC):
    return ref_BC[...]

  @staticmethod
  def scores(q_BD, k_KD):
    return jnp.dot(q_BD[...], k_KD[...].T, preferred_element_type=jnp.float32)

  @staticmethod
  def add_product(sum_BC, weight_BK, v_KC):
    return sum_BC + jnp.dot(weight_BK, v_KC[...], preferred_element_type=jnp.float32)

  @classmethod
  def add_product_and_scores(cls, sum_BC, weight_BK, y_KC, b_BC):
    return cls.add_product(sum_BC, weight_BK, y_KC), cls.scores(b_BC, y_KC)
