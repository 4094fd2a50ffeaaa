"""Attention between jagged sequences: generalised dot-product attention (GDPA).

Letters: S segments, T queries, E keys, H heads, D width of a head, N buckets of a bias.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from numbers import Integral, Real

import jax
import jax.numpy as jnp

from pallas_kernels import segments
from pallas_kernels.dispatch import Refused, dispatch
from pallas_kernels.jagged_attention import reference, rotary, triton, xla
from pallas_kernels.jagged_attention.activation import POINTWISE, SOFTMAX
from pallas_kernels.jagged_attention.bias import RelativeBias
from pallas_kernels.jagged_attention.form import Form, Plan, Saved
from pallas_kernels.jagged_attention.visible import key_positions, visible

_OP = "jagged_attention"
_IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic")


def jagged_attention(
  q_THD: jax.Array,
  k_EHD: jax.Array,
  v_EHD: jax.Array,
  q_offsets_S1: jax.Array,
  kv_offsets_S1: jax.Array | None = None,
  *,
  activation: str = SOFTMAX,
  scale: float | None = None,
  norm: float | str | None = None,
  causal: bool = False,
  window: int | None = None,
  block: int | None = None,
  kv_segment_S: jax.Array | None = None,
  biases: Sequence[RelativeBias] = (),
  qk_norm: tuple[jax.Array, jax.Array] | None = None,
  rope: float | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Every query's sum over the keys it sees in its own segment.

      out_t = sum_e f(s_te) v_e / norm_t,     s_te = scale * q_t.k_e + sum of biases_te

  over keys e that t sees. f is the softmax over them, or SiLU, GELU (tanh) or ReLU^2 of each alone.
  All masks are intervals of keys (visible.py); tiles outside of them are not visited, forward or
  backward. Sums are float32. The same inputs give the same bits: nothing is added atomically.

  Args:
    q_THD, k_EHD, v_EHD: bf16, fp16 or float32, all the same. Kernels round f(s) / norm to it, so
      that it must stay below 65,504 in fp16, and multiply float32 as TF32. Rows outside the
      segments may hold anything; their output and gradients are 0. A NaN inside a segment may
      spread to short ones beside it, which share its tiles, and in Mosaic to any beside it. A query
      that sees no key has output 0.
    q_offsets_S1: int32, rising; segment s has the queries [q_offsets[s], q_offsets[s + 1]). What
      reaches beyond the array is cut at its end.
    kv_offsets_S1: The same of keys; None for self-attention, where T must equal E.
    activation: "softmax", "silu", "gelu" or "relu2".
    scale: Of q.k; 1 / sqrt(D) for the softmax and 1 for the others (HSTU) unless given.
    norm: What the others are divided by: a number (HSTU: the longest length), or "length" for the
      number of keys of the segment. None divides by nothing. The softmax has none.
    causal: A query sees keys up to its own position. The last query of a segment stands at its last
      key, so that fewer queries than keys are the segment's most recent ones.
    window: Sees only keys nearer than this many positions; of those with `causal` the past ones.
    block: Sees only the keys of its own block of so many positions (GEM's BlockAttention has 64).
    kv_segment_S: int32: whose keys a segment of queries attends to, so that candidates of one
      request share its keys; none where there is no such segment. Where it falls more is visited.
      Its own number unless given.
    biases: Additive relative biases, each with a table (H, N) that has a gradient.
    qk_norm: (gain_D of queries, gain_D of keys): RMS norm of each head before the product.
    rope: Base of rotary positions, such as 10000; None for none. D must be even.
    implementation: See dispatch.py; "mosaic" is for Hopper, in bf16 and fp16, widths of 64, 128 and
      256 and without biases; its backward pass is Triton's at 256, and in fp16 but for the softmax.

  Returns:
    out_THD in the dtype of q.

  PMA (few queries that all segments share): q = jnp.tile(seed_MHD, (S, 1, 1)), q_offsets = M *
  arange(S + 1); queries of many segments then share a tile, and each key is read once.

  Raises:
    ValueError: Shapes, dtypes or options that do not fit.
    Refused: An implementation asked for by name that cannot do it.

  Source: HSTU (arXiv 2402.17152, 3.2); FlashAttention-2 (arXiv 2307.08691) for the order of work;
    GDPA and BlockAttention of Meta's GEM (engineering.fb.com, 2025-11-10 and 2026-08-03).
  """
  if implementation not in (None, *_IMPLEMENTATIONS):
    raise Refused(
      f"{_OP}: implementation {implementation!r} is not one of {', '.join(_IMPLEMENTATIONS)}"
    )
  q_THD, k_EHD, v_EHD = map(jnp.asarray, (q_THD, k_EHD, v_EHD))
  shared = kv_offsets_S1 is None or kv_offsets_S1 is q_offsets_S1
  q_offsets_S1 = segments.as_offsets(_OP, "q_offsets", q_offsets_S1)
  if not shared:
    kv_offsets_S1 = segments.as_offsets(_OP, "kv_offsets", kv_offsets_S1)
  kv_offsets_S1 = q_offsets_S1 if shared else kv_offsets_S1
  own = kv_offsets_S1 is q_offsets_S1 and kv_segment_S is None
  if kv_offsets_S1 is q_offsets_S1 and q_THD.shape[:1] != k_EHD.shape[:1]:
    raise ValueError(
      f"{_OP}: self-attention has as many queries as keys, here {q_THD.shape[:1]} and "
      f"{k_EHD.shape[:1]}; give kv_offsets for keys of their own"
    )
  kv_segment_S = None if kv_segment_S is None else jnp.asarray(kv_segment_S)
  if isinstance(biases, RelativeBias) or not all(isinstance(b, RelativeBias) for b in biases):
    raise ValueError(f"{_OP}: biases must be a sequence of RelativeBias, are {biases!r:.60}")
  biases = tuple(RelativeBias(*map(jnp.asarray, b[:3]), b.buckets) for b in biases)
  if qk_norm is not None:
    if not isinstance(qk_norm, tuple | list) or len(qk_norm) != 2:
      raise ValueError(
        f"{_OP}: qk_norm must be the gains of queries and of keys, is {qk_norm!r:.60}"
      )
    qk_norm = tuple(map(jnp.asarray, qk_norm))
  _check(q_THD, k_EHD, v_EHD, q_offsets_S1, kv_offsets_S1, kv_segment_S, biases, qk_norm)
  _check_options(activation, norm, window, block, rope, q_THD.shape[2])
  if scale is None:
    scale = 1 / math.sqrt(q_THD.shape[2]) if activation == SOFTMAX else 1.0

  # What is wider than all keys hides none, and positions stay far from the ends of int32.
  window, block = (None if x is None else min(x, len(q_THD) + len(k_EHD)) for x in (window, block))
  options = {"causal": causal, "window": window, "block": block}
  # Traced offsets cannot be refused; beyond the arrays they must not lead.
  q_offsets_S1 = jnp.clip(q_offsets_S1, 0, len(q_THD))
  kv_offsets_S1 = jnp.clip(kv_offsets_S1, 0, len(k_EHD))
  seen = visible(q_offsets_S1, kv_offsets_S1, kv_segment_S, len(q_THD), **options)
  gain_q, gain_k = qk_norm or (None, None)
  if qk_norm is not None:
    q_THD, k_EHD = _own(q_THD, q_offsets_S1), _own(k_EHD, kv_offsets_S1)
  place_E = seen.position_T if own else key_positions(kv_offsets_S1, len(k_EHD))
  q_THD = rotary.prepare(q_THD, gain_q, seen.position_T, rope)
  k_EHD = rotary.prepare(k_EHD, gain_k, place_E, rope)
  gain_T = jnp.ones(q_THD.shape[:1], jnp.float32)
  if norm == "length":
    gain_T /= jnp.maximum(seen.keys_T, 1).astype(jnp.float32)
  elif norm is not None:
    gain_T /= norm
  plan = Plan(
    q_offsets_S1,
    kv_offsets_S1,
    seen.lo_T,
    seen.hi_T,
    gain_T,
    tuple(b.q_T for b in biases),
    tuple(b.kv_E for b in biases),
  )
  form = Form(activation, float(scale), tuple(b.buckets for b in biases))
  tables = tuple(b.table_HN for b in biases)
  if not len(q_THD) or not len(k_EHD) or len(q_offsets_S1) == 1:
    return jnp.zeros_like(q_THD)
  if implementation == "reference":
    return reference.attend(form, q_THD, k_EHD, v_EHD, tables, plan)
  return _attend(form, implementation, q_THD, k_EHD, v_EHD, tables, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(form: Form, implementation: str | None, q_THD, k_EHD, v_EHD, tables, plan: Plan):
  return _attend_forward(form, implementation, q_THD, k_EHD, v_EHD, tables, plan)[0]


def _attend_forward(form, implementation, q_THD, k_EHD, v_EHD, tables, plan):
  args = (q_THD, k_EHD, v_EHD, tables, plan)
  known = {"xla": functools.partial(xla.forward, form)}
  known["triton"] = functools.partial(triton.forward, form)
  refusal = triton.refusal(q_THD, k_EHD, tables)
  if implementation == "mosaic":  # Only then: not every platform's jaxlib has Mosaic.
    from pallas_kernels.jagged_attention import mosaic

    known["mosaic"] = functools.partial(mosaic.forward, form)
    refusal = mosaic.refusal(q_THD, k_EHD, tables)
  saved: Saved = dispatch(_OP, implementation, known, *args, refusal=refusal)
  return saved.out_THD, (*args, saved)


def _attend_backward(form, implementation, residuals, g_THD):
  q_THD, k_EHD, _, tables, plan, _ = residuals
  known = {"xla": functools.partial(xla.backward, form)}
  known["triton"] = known["mosaic"] = functools.partial(triton.backward, form)
  refusal = triton.refusal(q_THD, k_EHD, tables)
  if implementation == "mosaic":
    from pallas_kernels.jagged_attention import mosaic_backward

    if mosaic_backward.serves(form, q_THD):
      known["mosaic"] = functools.partial(mosaic_backward.backward, form)
  args = (*residuals, jnp.asarray(g_THD))
  found = dispatch(_OP, implementation, known, *args, refusal=refusal)
  dtables = tuple(d.astype(t.dtype) for d, t in zip(found.tables, tables))
  return found.q_THD, found.k_EHD, found.v_EHD, dtables, jax.tree.map(lambda _: None, plan)


_attend.defvjp(_attend_forward, _attend_backward)


def _own(x_THD: jax.Array, offsets_S1: jax.Array) -> jax.Array:
  """Rows outside the segments as zeros: a gain's gradient sums over all, and they may be NaN."""
  row_T = jnp.arange(len(x_THD))
  own_T = (row_T >= offsets_S1[0]) & (row_T < offsets_S1[-1])
  return jnp.where(own_T[:, None, None], x_THD, 0)


def _check(q_THD, k_EHD, v_EHD, q_offsets_S1, kv_offsets_S1, kv_segment_S, biases, qk_norm) -> None:
  if q_THD.ndim != 3 or k_EHD.ndim != 3 or k_EHD.shape != v_EHD.shape:
    raise ValueError(
      f"{_OP}: q must be (queries, heads, width), k and v both (keys, heads, width), "
      f"are {q_THD.shape}, {k_EHD.shape}, {v_EHD.shape}"
    )
  if q_THD.shape[1:] != k_EHD.shape[1:] or not all(q_THD.shape[1:]):
    raise ValueError(
      f"{_OP}: q and k must have the same heads and width, at least 1, "
      f"have {q_THD.shape[1:]}, {k_EHD.shape[1:]}"
    )
  if not q_THD.dtype == k_EHD.dtype == v_EHD.dtype or not (
    jnp.issubdtype(q_THD.dtype, jnp.floating) and q_THD.dtype.itemsize > 1
  ):
    raise ValueError(
      f"{_OP}: q, k and v must have one float dtype of 16 bits or more, "
      f"have {q_THD.dtype}, {k_EHD.dtype}, {v_EHD.dtype}"
    )
  queried = len(q_offsets_S1) - 1
  if kv_segment_S is not None:
    if kv_segment_S.shape != (queried,) or kv_segment_S.dtype != jnp.int32:
      raise ValueError(
        f"{_OP}: kv_segment must be int32 of shape ({queried},), one a segment of queries, "
        f"is {kv_segment_S.dtype} of shape {kv_segment_S.shape}"
      )
  elif len(kv_offsets_S1) != len(q_offsets_S1):
    raise ValueError(
      f"{_OP}: queries have {queried} segments and keys {len(kv_offsets_S1) - 1}; "
      "give kv_segment where segments share keys"
    )
  for i, bias in enumerate(biases):
    wanted = {"table_HN": (q_THD.shape[1], bias.table_HN.shape[-1])}
    wanted |= {"q_T": q_THD.shape[:1], "kv_E": k_EHD.shape[:1]}
    for name, shape in wanted.items():
      if getattr(bias, name).shape != shape:
        raise ValueError(
          f"{_OP}: {name} of bias {i} must have the shape {shape}, has {getattr(bias, name).shape}"
        )
    if bias.q_T.dtype != jnp.int32 or bias.kv_E.dtype != jnp.int32:
      raise ValueError(
        f"{_OP}: coordinates of bias {i} must be int32, are {bias.q_T.dtype} and {bias.kv_E.dtype}"
      )
    bias.buckets.check(f"{_OP}: bias {i}", bias.table_HN)
  for gain_D in qk_norm or ():
    if gain_D.shape != q_THD.shape[2:]:
      raise ValueError(f"{_OP}: gains of qk_norm must be {q_THD.shape[2:]}, one is {gain_D.shape}")


def _check_options(activation, norm, window, block, rope, width) -> None:
  if activation != SOFTMAX and activation not in POINTWISE:
    raise ValueError(
      f"{_OP}: activation {activation!r} is not one of {', '.join([SOFTMAX, *POINTWISE])}"
    )
  if norm is not None and activation == SOFTMAX:
    raise ValueError(f"{_OP}: the softmax sums to 1, so norm={norm!r} must be None")
  if not (norm is None or (isinstance(norm, str) and norm == "length")) and not (
    isinstance(norm, Real) and norm > 0
  ):
    raise ValueError(f'{_OP}: norm must be a positive number, "length" or None, is {norm!r}')
  for name, value in (("window", window), ("block", block)):
    if value is not None and not (isinstance(value, Integral) and value >= 1):
      raise ValueError(f"{_OP}: {name} must be at least 1 position, is {value}")
  if rope is not None and (width % 2 or not rope > 1):
    raise ValueError(
      f"{_OP}: rope turns pairs of columns by a base above 1, has base {rope} and width {width}"
    )
