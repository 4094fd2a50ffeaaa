"""jagged_attention: every implementation on the same lengths against one float64 oracle."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
  BEFORE,
  FORMS,
  IMPLEMENTATIONS,
  ROOM,
  SEGMENTS,
  TOGETHER,
  TOLERANCE,
  assert_close,
  case_of,
  expected,
  jagged,
  make_biases,
  padded,
  program,
  run,
  with_gradient,
)
from compiled_quickly import ON_GPU

from pallas_kernels.case import LENGTHS, offsets
from pallas_kernels.jagged_attention.api import jagged_attention
from pallas_kernels.jagged_attention.bias import Buckets, RelativeBias


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_lengths(implementation, form):
  for name in TOGETHER:
    found = run(implementation, form, case_of(name))
    assert_close(found, expected(form, name), TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_short_segments(implementation):
  shape = {"name": "many_short", "width": 16, "heads": 1}
  found = run(implementation, "gelu_window", case_of(**shape))
  assert_close(found, expected("gelu_window", **shape), TOLERANCE["float32"])


@pytest.mark.skipif(not ON_GPU, reason="on a CPU it has a test file of its own, and an interpreter")
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("width", (64, 128, 256))
@pytest.mark.parametrize("form", ("softmax", "gelu_window", "relu2_blocks"))
def test_mosaic(form, width, dtype):
  for name in ("around_block", "zipf"):
    shape = {"name": name, "dtype": dtype, "width": width}
    assert_close(run("mosaic", form, case_of(**shape)), expected(form, **shape), TOLERANCE[dtype])


@pytest.mark.parametrize(
  "implementation", ["xla", "triton", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_one_long_segment_among_empty_ones(implementation):
  shape = {"name": "one_long", "width": 16, "heads": 1}
  wanted = expected("relu2_blocks", **shape)
  if implementation == "reference":  # Of all pairs of 16,384; its gradient is JAX's.
    case, options = case_of(**shape), FORMS["relu2_blocks"][0]
    attend = functools.partial(jagged_attention, implementation=implementation, **options)
    found = ([jax.jit(attend)(*case[:3], *case[4:])], [])
    wanted = ([wanted[0][0]], [])
  else:
    found = run(implementation, "relu2_blocks", case_of(**shape))
  assert_close(found, wanted, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", ("xla", "triton"))
def test_one_long_segment_where_all_see_all_before_them(implementation):
  """134 million pairs, so forward only, and the oracle on rows here and there."""
  q, k, v, _, q_offsets, kv_offsets = case_of("one_long", width=16, heads=1)
  out = jax.jit(
    functools.partial(jagged_attention, causal=True, implementation=implementation)
  )(q, k, v, q_offsets, kv_offsets)  # fmt: skip
  assert np.isfinite(out).all()
  for row in (3, 66, 67, 5_000, 16_386):
    Q, K, V = (x[:, 0].astype(np.float64) for x in (q, k, v))
    weight = np.exp(K[BEFORE : row + 1] @ Q[row] / 4)
    np.testing.assert_allclose(out[row, 0], weight @ V[BEFORE : row + 1] / weight.sum(), atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_segments_and_no_rows(implementation):
  for rows, segments in ((7, 0), (0, 3), (0, 0)):
    q = np.full((rows, 2, 16), np.nan, np.float32)
    offset_S1 = np.zeros((segments + 1,), np.int32)
    fn = functools.partial(jagged_attention, q_offsets_S1=offset_S1, implementation=implementation)
    out, pull = jax.vjp(fn, q, q, q)
    assert out.shape == q.shape and not np.any(out)
    assert all(x.shape == q.shape and not np.any(x) for x in pull(jnp.ones_like(out)))


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("implementation", ("xla", "triton"))
@pytest.mark.parametrize("width", (8, 40, 64))
def test_half_precision_and_widths(implementation, dtype, width):
  shape = {"name": "empty_among", "dtype": dtype, "width": width}
  found = run(implementation, "softmax", case_of(**shape))
  assert_close(found, expected("softmax", **shape), TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cross_attention_with_lengths_of_its_own(implementation):
  q_length_S, kv_length_S = np.array([3, 0, 70, 5, 1]), np.array([130, 4, 0, 66, 2])
  case = jagged(q_length_S, kv_length_S=kv_length_S)
  fn = program(implementation, (("causal", True),), ())
  *found, _ = fn(*case, (), ())
  *wanted, _ = oracle.attend(*case, causal=True)
  assert_close((map(np.asarray, found), ()), (wanted, ()), TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_candidates_of_one_request_share_its_keys(implementation):
  kv_segment_S = np.array([0, 0, 0, 1, 3, 3], np.int32)
  q, k, v, g, q_offsets, kv_offsets = jagged(
    np.array([2, 2, 2, 1, 9, 70]), kv_length_S=np.array([65, 4, 12, 90])
  )
  shared = {"causal": True, "activation": "silu"}
  fn = lambda q, k, v: jagged_attention(
    q,
    k,
    v,
    q_offsets,
    kv_offsets,
    kv_segment_S=kv_segment_S,
    implementation=implementation,
    **shared,
  )
  found = with_gradient(fn, g)(q, k, v)
  *wanted, _ = oracle.attend(q, k, v, g, q_offsets, kv_offsets, kv_segment=kv_segment_S, **shared)
  assert_close((map(np.asarray, found), ()), (wanted, ()), TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_where_segments_share_keys_in_any_order(implementation):
  kv_segment_S = np.array([2, 0, 0, 1, 1, 0], np.int32)
  q, k, v, g, q_offsets, kv_offsets = case = jagged(
    np.array([2, 9, 70, 1, 65, 4]), kv_length_S=np.array([65, 130, 7])
  )
  biases = make_biases([(2, True, 24)], len(q), len(k), q.shape[1])
  ((table, q_T, kv_E, bits, signed),) = biases

  def fn(q, k, v, table):
    bias = RelativeBias(table, q_T, kv_E, Buckets(bits, signed))
    options = {"kv_segment_S": kv_segment_S, "implementation": implementation}
    return jagged_attention(q, k, v, q_offsets, kv_offsets, biases=[bias], **options)

  *found, dtable = with_gradient(fn, g)(q, k, v, table)
  *wanted, dtables = oracle.attend(*case, kv_segment=kv_segment_S, biases=biases)
  found = map(np.asarray, found), [np.asarray(dtable)]
  assert_close(found, (wanted, dtables), TOLERANCE["float32"])


@pytest.mark.parametrize("of", range(4), ids="qkvg")
@pytest.mark.parametrize("implementation", ("xla", "triton"))
def test_a_nan_does_not_reach_another_long_segment(implementation, of):
  """Those that are as long as a tile share none."""
  *arrays, q_offsets, kv_offsets = jagged(np.array([70, 70, 70, 70, 70, 300, 300]))
  arrays[of] = arrays[of].copy()
  arrays[of][q_offsets[1] + 5] = np.nan
  fn = lambda q, k, v: jagged_attention(
    q, k, v, q_offsets, kv_offsets, implementation=implementation
  )
  for x in with_gradient(fn, arrays[3])(*arrays[:3]):
    others = np.delete(np.asarray(x), np.r_[q_offsets[1] : q_offsets[2]], axis=0)
    assert np.isfinite(others).all()


@pytest.mark.parametrize("implementation", ("xla", "triton"))
def test_pooling_by_attention_with_seeds_of_all_segments(implementation):
  """PMA: the gradient of the shared seeds is the sum over segments."""
  _, k, v, _, _, kv_offsets = jagged(LENGTHS["empty_among"])
  rng = np.random.default_rng(5)
  seed_MHD = rng.standard_normal((2, 2, 16)).astype(np.float32)
  count = len(kv_offsets) - 1
  g = rng.standard_normal((2 * count, 2, 16)).astype(np.float32)
  q_offsets = 2 * np.arange(count + 1, dtype=np.int32)
  fn = lambda seed: jagged_attention(
    jnp.tile(seed, (count, 1, 1)), k, v, q_offsets, kv_offsets, implementation=implementation
  )
  out, dseed = with_gradient(fn, g)(seed_MHD)
  q = np.tile(seed_MHD, (count, 1, 1))
  wanted, dq, *_ = oracle.attend(q, k, v, g, q_offsets, kv_offsets)
  np.testing.assert_allclose(out, wanted, atol=1e-5)
  np.testing.assert_allclose(dseed, dq.reshape(count, 2, 2, 16).sum(0), atol=1e-4)


@pytest.mark.parametrize("implementation", ("xla", "triton"))
def test_gradients_are_those_that_jax_takes_of_the_reference(implementation):
  case = case_of("around_block")
  for x, y in zip(run(implementation, "hstu", case), run("reference", "hstu", case)):
    for a, b in zip(x, y):
      np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


def rotated(x, position, base=100.0):
  """Rotary positions as complex numbers."""
  half = x.shape[-1] // 2
  angle = position[:, None] * base ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
  return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize("implementation", ("xla", "triton"))
def test_keys_of_no_segment_are_not_seen(implementation):
  """Neither before the first nor behind the last: nothing wraps around."""
  q, k, v, _, *offsets = jagged(np.array([5, 6, 3]), kv_length_S=np.array([6, 3, 9]))
  run = functools.partial(jagged_attention, q, k, v, *offsets)
  found = run(kv_segment_S=np.array([-2, 1, 3], np.int32), implementation=implementation)
  wanted = run(implementation="reference")
  first, a, b, last = offsets[0]
  np.testing.assert_allclose(found[a:b], wanted[a:b], atol=2e-5)
  assert not found[first:a].any() and not found[b:last].any()


@pytest.mark.parametrize("implementation", ("xla", "triton"))
def test_norm_and_rotary_positions_inside(implementation):
  q, k, v, g, q_offsets, kv_offsets = jagged(np.array([5, 0, 70]), kv_length_S=np.array([6, 3, 90]))
  gain_q, gain_k = (np.random.default_rng(i).uniform(0.5, 2, 16).astype(np.float32) for i in (1, 2))

  def fn(implementation, q, k, v, gain_q, gain_k):
    options = {"rope": 100.0, "qk_norm": (gain_q, gain_k), "implementation": implementation}
    return jagged_attention(q, k, v, q_offsets, kv_offsets, **options)

  args = q, k, v, gain_q, gain_k
  out, *gradients = with_gradient(functools.partial(fn, implementation), g)(*args)
  normed = [
    x.astype(np.float64)
    / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    * gain
    for x, gain in ((q, gain_q), (k, gain_k))
  ]
  place = [np.zeros(len(x)) for x in (q, k)]
  for s in range(3):
    (a, b), (c, d) = q_offsets[s : s + 2], kv_offsets[s : s + 2]
    place[0][a:b] = np.arange(b - a) + (d - c) - (b - a)
    place[1][c:d] = np.arange(d - c)
  turned = [rotated(x, p) for x, p in zip(normed, place)]
  wanted, *_ = oracle.attend(*turned, v, g, q_offsets, kv_offsets)
  np.testing.assert_allclose(out, wanted, atol=2e-5)
  _, *wanted = with_gradient(functools.partial(fn, "reference"), g)(*args)
  for x, y in zip(gradients, wanted):
    assert np.isfinite(x).all()
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1, np.abs(y).max()))


@pytest.mark.parametrize("implementation", ("xla", "triton"))
def test_order_of_segments_does_not_matter(implementation):
  length_S = padded(LENGTHS["around_block"])
  q, k, v, g, q_offsets, _ = case = jagged(length_S, room=ROOM)
  order = np.random.default_rng(3).permutation(SEGMENTS)
  row = np.concatenate([np.arange(q_offsets[s], q_offsets[s + 1]) for s in order])
  shuffled = [x.copy() for x in (q, k, v, g)]
  for x, y in zip(shuffled, (q, k, v, g)):
    x[BEFORE : BEFORE + len(row)] = y[row]
  new = offsets(length_S[order], BEFORE)
  found, _ = run(implementation, "softmax", case)
  again, _ = run(implementation, "softmax", (*shuffled, new, new))
  for x, y in zip(found, again):
    np.testing.assert_allclose(y[BEFORE : BEFORE + len(row)], x[row], atol=2e-6)


@pytest.mark.parametrize("implementation", ("xla", "triton"))
def test_another_segment_changes_no_bit_and_a_run_repeats_itself(implementation):
  case = jagged(padded(LENGTHS["empty_among"]), room=ROOM)
  q_offsets = case[4]
  first, _ = run(implementation, "softmax", case)
  again, _ = run(implementation, "softmax", case)
  changed = [x.copy() for x in case]
  stranger = slice(q_offsets[4], q_offsets[5])  # The 130 events; 7 lie before it and 3 behind.
  for x in changed[:4]:
    x[stranger] *= -3
  other, _ = run(implementation, "softmax", changed)
  for x, y, z in zip(first, again, other):
    assert x.tobytes() == y.tobytes()
    kept = np.delete(np.arange(len(x)), np.r_[stranger])
    assert x[kept].tobytes() == z[kept].tobytes()
    assert x[stranger].tobytes() != z[stranger].tobytes()
