"""fp8: every implementation, to the bit, against ml_dtypes' rounding of float64 quotients."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiled_quickly import ON_GPU
from laid_out import compiled

from pallas_kernels import noise
from pallas_kernels.dispatch import Refused
from pallas_kernels.quantize_fp8 import bench, shapes, triton
from pallas_kernels.quantize_fp8.api import dequantize_fp8, quantize_fp8

CAST = pytest.mark.skipif(ON_GPU, reason="the reference casts, which XLA rounds otherwise on a GPU")
IMPLEMENTATIONS = (pytest.param("reference", marks=CAST), "xla", "triton")
DTYPES = ("float8_e4m3fn", "float8_e5m2")
GROUPS = [  # Shapes that leave tiles and blocks short; the last has rows too long for a tile.
  ((7,), "tensor"),
  ((70, 45), "tensor"),
  ((3, 33, 65), "row"),
  ((3, 33, 65), "block"),
  ((2, 20_000), "row"),
]


@functools.cache
def quantizer(implementation, granularity, dtype):
  fn = lambda x, key: quantize_fp8(
    x, granularity=granularity, dtype=dtype, key=key, implementation=implementation
  )
  return compiled(fn)


def quantize(x, granularity, dtype, implementation, key=None):
  values, scales = quantizer(implementation, granularity, dtype)(x, key)
  assert values.dtype == dtype
  assert scales.dtype == jnp.float32
  return np.asarray(values), np.asarray(scales)


def bits(values):
  return np.asarray(values).view(np.uint8)


def groups(shape, granularity):
  """(index of the scale, index of its elements) of every group."""
  if granularity == "tensor":
    yield (), ()
  elif granularity == "row":
    for i in np.ndindex(*shape[:-1]):
      yield i, i
  else:
    for lead in np.ndindex(*shape[:-2]):
      for i in range(-(-shape[-2] // 32)):
        for j in range(-(-shape[-1] // 32)):
          yield (*lead, i, j), (*lead, slice(32 * i, 32 * i + 32), slice(32 * j, 32 * j + 32))


def oracle(x, granularity, dtype):
  """(values, scales, quotients in float64)."""
  dtype = ml_dtypes.finfo(dtype).dtype
  largest_number = float(ml_dtypes.finfo(dtype).max)
  x = np.asarray(x).astype(np.float64)
  x[np.abs(x) < 2.0**-126] = 0
  y, scales = np.empty_like(x), {}
  for scale_at, at in groups(x.shape, granularity):
    finite = np.abs(x[at])[np.isfinite(x[at])]
    scale = 1.0
    if finite.size and finite.max() > 0:
      scale = 2.0**-126
      while finite.max() / scale > largest_number:
        scale *= 2
    scales[scale_at] = scale
    y[at] = x[at] / scale
  return y.astype(dtype), scales, y


def awkward(shape, seed=0, dtype=np.float32):
  """Magnitudes over 50 octaves, zeros, what is not finite, a subnormal, a row of zeros."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * np.exp2(rng.integers(-30, 20, shape))
  x.flat[[0, 1, 2, 3]] = [0, np.nan, -np.inf, 1e-40]
  if len(shape) > 1:
    x[..., -1, :] = 0
  return x.astype(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "granularity"), GROUPS)
def test_to_nearest(shape, granularity, dtype, implementation):
  x = awkward(shape)
  values, scales = quantize(x, granularity, dtype, implementation)
  want, want_scales, _ = oracle(x, granularity, dtype)
  np.testing.assert_array_equal(bits(values), bits(want))
  assert scales.shape == tuple(1 + max(i) for i in zip(*want_scales))
  for at, scale in want_scales.items():
    assert scales[at] == scale


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_and_every_tie(dtype, implementation):
  """All finite codes are kept; all midpoints go to the even one, what is beside them does not."""
  codes = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
  kept = np.sort(codes[np.isfinite(codes)])
  middle = (kept[1:] + kept[:-1]) / 2
  x = np.concatenate([kept, middle, np.nextafter(middle, -1e9), np.nextafter(middle, 1e9)])
  for octave in (-100, 0, 90):
    scaled = np.ldexp(x, octave).astype(np.float32)
    values, scales = quantize(scaled, "tensor", dtype, implementation)
    assert scales == np.ldexp(1.0, octave)
    np.testing.assert_array_equal(values, oracle(scaled, "tensor", dtype)[0])
    np.testing.assert_array_equal(values[: len(kept)].astype(np.float32), kept)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("of", ["float32", "bfloat16", "float16"])
def test_extremes(of, implementation):
  """Nothing finite saturates or is lost; what is not finite stays that and touches nobody else."""
  info = ml_dtypes.finfo(of)
  for largest in (info.max, 2 * info.tiny, 1.75, np.nextafter(np.float32(1.75), 2)):
    x = jnp.asarray([largest, -largest, largest / 2, 0, np.nan, np.inf, -np.inf], of)
    for dtype in DTYPES:
      values, scales = quantize(x, "tensor", dtype, implementation)
      np.testing.assert_array_equal(bits(values), bits(oracle(x, "tensor", dtype)[0]))
      back = dequantize_fp8(jnp.asarray(values), jnp.asarray(scales), dtype=of)
      back = np.asarray(back, np.float32)
      x_7 = np.asarray(x, np.float32)
      np.testing.assert_allclose(back[:4], x_7[:4], rtol=2.0**-3)
      assert np.isnan(back[4])
      assert not np.isfinite(back[5:]).any()
      if dtype == "float8_e5m2":
        assert back[5] == -back[6] == np.inf


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zeros(implementation):
  for shape, granularity in GROUPS:
    values, scales = quantize(np.zeros(shape, np.float32), granularity, DTYPES[0], implementation)
    assert not bits(values).any()
    assert (scales == 1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("shape", "granularity", "dtype"), [(*g, DTYPES[i % 2]) for i, g in enumerate(GROUPS)]
)
def test_stochastic(shape, granularity, dtype, implementation):
  """One of the two neighbours, by the noise of the element's place; so the same everywhere."""
  x, key = awkward(shape, seed=1), jax.random.key(4)
  values, _ = quantize(x, granularity, dtype, implementation, key)
  again, _ = quantize(x, granularity, dtype, implementation, key)
  np.testing.assert_array_equal(bits(values), bits(again))
  _, _, y = oracle(x, granularity, dtype)
  info = ml_dtypes.finfo(dtype)
  with np.errstate(all="ignore"):
    octave = np.maximum(np.floor(np.log2(np.abs(y))), info.minexp)
  step = np.exp2(np.where(np.isfinite(octave), octave, 0) - info.nmant)
  row, column = np.divmod(np.arange(x.size, dtype=np.uint32).reshape(shape), shape[-1])
  random = noise.random_bits(*noise.words_of("test", key), *map(jnp.asarray, (row, column)))
  want = np.floor(np.abs(y) / step + np.asarray(random, np.float64) / 2.0**32) * step
  finite = np.isfinite(y)
  np.testing.assert_array_equal(np.abs(values.astype(np.float64))[finite], want[finite])
  assert (np.signbit(values.astype(np.float64)) == np.signbit(y))[finite & (want > 0)].all()
  np.testing.assert_array_equal(bits(values)[~finite], bits(y.astype(info.dtype))[~finite])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_is_unbiased(dtype):
  """The mean of n roundings is within 5 sqrt(p (1 - p) / n) steps of x, p its share of the step.

  Also far below the smallest subnormal, where the chance is 2^-7.
  """
  info = ml_dtypes.finfo(dtype)
  n, tiny = 2**18, float(info.smallest_subnormal)
  for x, step in (
    (1.03, 2.0**-info.nmant),
    (-3.3, 2.0 * 2.0**-info.nmant),
    (0.4 * tiny, tiny),
    (tiny * 2.0**-7, tiny),
    (float(info.max) * 0.99, float(info.max) / (2 ** (info.nmant + 1) - 1 - (dtype == DTYPES[0]))),
  ):
    x_N = np.full(n, x, np.float32)
    x_N[0] = info.max  # So that the scale is 1.
    values, scales = quantize(x_N, "tensor", dtype, "xla", jax.random.key(0))
    assert scales == 1
    y = values[1:].astype(np.float64)
    assert len(np.unique(y)) == 2
    assert np.ptp(y) == step
    p = abs(float(x_N[1])) / step % 1
    assert abs(y.mean() - float(x_N[1])) < 5 * step * np.sqrt(p * (1 - p) / n)
    other, _ = quantize(x_N, "tensor", dtype, "xla", jax.random.key(1))
    differ = (bits(other) != bits(values)).mean()
    assert abs(differ - 2 * p * (1 - p)) < 5 * np.sqrt(2 * p * (1 - p) / n)


@pytest.mark.parametrize("of", ["float32", "bfloat16"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_dequantized_is_near(granularity, of):
  x = np.random.default_rng(0).standard_normal((3, 70, 50)).astype(np.float32)
  there_and_back = jax.jit(
    lambda x: dequantize_fp8(*quantize_fp8(x, granularity=granularity), dtype=of)
  )
  back = there_and_back(x)
  assert back.dtype == of
  # Half a step of 3 bits, or of the smallest subnormal times the scale.
  largest_scale = np.exp2(np.ceil(np.log2(np.abs(x).max() / 448)))
  bound = np.maximum(np.abs(x) * 2.0**-4, 2.0**-10 * largest_scale)
  assert (np.abs(np.asarray(back, np.float32) - x) <= bound).all()
  # A second time nothing is lost, though a group's largest may have come to fit half the scale.
  np.testing.assert_array_equal(there_and_back(back), back)


def test_tiles_hold_whole_groups():
  assert triton.tile_of((1, 5, 1_000), "row") == (4, 1_024)
  assert triton.tile_of((1, 5, 16_384), "row") == (1, 16_384)
  assert triton.tile_of((4, 100, 40), "block") == (32, 64)
  assert triton.tile_of((1, 1, 10_000), "tensor") == (1, 4_096)
  assert triton.tile_of((1, 10_000, 1), "tensor") == (4_096, 1)


def test_nothing():
  values, scales = quantize_fp8(jnp.zeros((0, 5)), granularity="row")
  assert values.shape == (0, 5)
  assert scales.shape == (0,)
  assert jax.jit(lambda x: dequantize_fp8(*quantize_fp8(x)))(3.0) == 3


def test_it_has_no_gradient_but_may_be_saved_by_a_rule():
  x = jnp.linspace(-1, 1, 64)
  with pytest.raises(TypeError, match="quantize_fp8 has no gradient"):
    jax.grad(lambda x: dequantize_fp8(*quantize_fp8(x)).sum())(x)

  @jax.custom_vjp
  def square(x):
    return x * x

  square.defvjp(
    lambda x: (x * x, quantize_fp8(x)), lambda saved, dy: (2 * dy * dequantize_fp8(*saved),)
  )
  gradient = lambda fn: jax.jit(jax.grad(fn))(x)
  np.testing.assert_allclose(gradient(lambda x: square(x).sum()), 2 * x, rtol=2.0**-4)
  stopped = lambda x: (x * dequantize_fp8(*quantize_fp8(jax.lax.stop_gradient(x)))).sum()
  np.testing.assert_allclose(gradient(stopped), x, rtol=2.0**-4)


def test_bad_arguments():
  x = jnp.zeros((4, 4))
  for args, settings, message in (
    ((x.astype(jnp.int32),), {}, "x must be float32, bfloat16 or float16, is int32"),
    ((x,), {"granularity": "column"}, "granularity 'column' is not one of tensor, row, block"),
    (
      (x,),
      {"dtype": jnp.float8_e4m3},
      "must be float8_e4m3fn or float8_e5m2, is float8_e4m3",
    ),
    ((x[0],), {"granularity": "block"}, r"'block' needs 2 axes or more, x is of shape \(4,\)"),
    ((x,), {"key": 0}, r"key must be one jax\.random\.key"),
    ((x,), {"implementation": "cuda"}, "implementation 'cuda' is not one of"),
  ):
    with pytest.raises(ValueError, match=message):
      quantize_fp8(*args, **settings)
  values, scales = jnp.zeros((4, 4), DTYPES[0]), jnp.zeros((4,))
  for bad in ((x, scales), (values, scales[:2]), (values, scales.astype(jnp.bfloat16))):
    with pytest.raises(ValueError, match="must be what quantize_fp8 returns"):
      dequantize_fp8(*bad)
  large = jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)
  with pytest.raises(Refused, match=r"at most 2\^31 - 1 elements, and x has 2147483648"):
    jax.eval_shape(functools.partial(quantize_fp8, implementation="triton"), large)


def test_bench():
  found = list(bench.rows(quick=True))
  assert [row["shape"] for row in found] == list(shapes.SHAPES)
  for row in found:
    assert 0.6 < row["useful_tile_share"] <= 1
    assert row["flops_visited"] * row["useful_tile_share"] == pytest.approx(row["flops_needed"])
    assert row["xla_over_padded_speed"] == pytest.approx(row["padded_ms"] / row["xla_ms"])
