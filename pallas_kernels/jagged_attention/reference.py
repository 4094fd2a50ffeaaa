"""The formula, over all pairs of queries and keys; differentiated by JAX. Letters as in api.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.jagged_attention.activation import POINTWISE
from pallas_kernels.jagged_attention.form import Form, Plan, wide

ROWS = 512  # Queries taken at a time, which bounds memory at 512 E H scores.


def attend(
  form: Form,
  q_THD: jax.Array,
  k_EHD: jax.Array,
  v_EHD: jax.Array,
  tables: tuple[jax.Array, ...],
  plan: Plan,
) -> jax.Array:
  """out_THD in the dtype of q."""
  high = wide(q_THD)
  # What lies outside the segments may be NaN, and 0 times NaN is NaN.
  start, end = plan.kv_offsets_S1[0], plan.kv_offsets_S1[-1]
  row_E = jnp.arange(len(k_EHD))
  inside_E = (row_E >= start) & (row_E < end)
  k_EHD, v_EHD = (jnp.where(inside_E[:, None, None], x, 0).astype(high) for x in (k_EHD, v_EHD))

  @jax.checkpoint
  def of_query(q_HD, lo, hi, gain, coordinates):
    seen_E = (row_E >= lo) & (row_E < hi)
    q_HD = jnp.where(lo < hi, q_HD, 0).astype(high)
    score_HE = form.scale * jnp.einsum("hd,ehd->he", q_HD, k_EHD)
    for buckets, table_HN, x, x_E in zip(form.biases, tables, coordinates, plan.kv_coordinates):
      score_HE += table_HN.astype(high)[:, buckets(x - x_E, table_HN.shape[1])]
    if form.softmax:
      score_HE = jnp.where(seen_E, score_HE, -jnp.inf)
      weight_HE = jax.nn.softmax(score_HE, axis=1, where=seen_E)
    else:
      weight_HE = POINTWISE[form.activation].value(score_HE, jax.nn.sigmoid) * gain.astype(high)
    weight_HE = jnp.where(seen_E, weight_HE, 0)
    # Not a row of zeros times v, for then a NaN in the gradient of a row without keys would spread.
    return jnp.where(lo < hi, jnp.einsum("he,ehd->hd", weight_HE, v_EHD), 0)

  rows = (q_THD, plan.lo_T, plan.hi_T, plan.gain_T, plan.q_coordinates)
  out_THD = jax.lax.map(lambda row: of_query(*row), rows, batch_size=ROWS)
  return out_THD.astype(q_THD.dtype)
