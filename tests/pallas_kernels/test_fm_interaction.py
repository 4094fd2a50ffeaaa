"""fm_interaction: every implementation against numpy in float64, formula and gradients by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_quickly import ON_GPU

from pallas_kernels.dispatch import Refused
from pallas_kernels.fm_interaction import bench, shapes, xla
from pallas_kernels.fm_interaction.api import fm_interaction
from pallas_kernels.fm_interaction.tiling import Axis, Tiling

IMPLEMENTATIONS = ("reference", "xla", "triton")
EPS = 1e-3
# name: (B, N, K, D, attentive, learnt, dtype). Paged from 65 units, 161 wide or rank 33 on.
CASES = {
  "one_of_each": (2, 1, 1, 1, True, True, "float32"),
  "odd": (3, 13, 5, 20, False, True, "float32"),
  "odd_attentive": (3, 13, 5, 20, True, False, "float32"),
  "gram": (4, 16, 24, 40, False, False, "float32"),
  "kept_in_pieces": (2, 39, 24, 144, False, True, "float32"),
  "paged_units": (3, 70, 5, 20, False, True, "float32"),
  "paged_rank": (2, 13, 50, 20, True, True, "float32"),
  "paged_width": (2, 5, 3, 165, False, True, "float32"),
  "bfloat16": (3, 13, 5, 20, False, True, "bfloat16"),
  "bfloat16_paged": (2, 70, 20, 20, True, True, "bfloat16"),
  "float16": (3, 13, 5, 20, False, False, "float16"),
}


def draw(batch, units, rank, width, attentive, learnt, dtype, seed=0):
  """x, y, scale, bias and the output's gradient, rounded to dtype, as numpy float64."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(batch, units, width)) + 0.3
  y = rng.normal(size=(batch, units, rank) if attentive else (units, rank)) / np.sqrt(units)
  scale, bias = rng.normal(size=(2, units * rank))
  gradient = rng.normal(size=(batch, units * rank))
  rounded = [np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, y, gradient)]
  learnt = [np.float64(np.float32(a)) if learnt else None for a in (scale, bias)]
  return (*rounded[:2], *learnt, rounded[2])


def oracle(x, y, scale, bias, gradient, eps=EPS):
  """Output and gradients, example by example."""
  shared, size = y.ndim == 2, y.shape[-2] * y.shape[-1]
  out, of_x, of_y = np.zeros_like(gradient), np.zeros_like(x), np.zeros_like(y)
  of_scale, of_bias = np.zeros(size), np.zeros(size)
  for b in range(len(x)):
    y_NK = y if shared else y[b]
    gram = x[b] @ x[b].T
    pairs = (gram @ y_NK).reshape(-1)
    deviation = np.sqrt(pairs.var() + eps)
    normal = (pairs - pairs.mean()) / deviation
    out[b] = normal * (1 if scale is None else scale) + (0 if bias is None else bias)
    of_normal = gradient[b] * (1 if scale is None else scale)
    of_scale += gradient[b] * normal
    of_bias += gradient[b]
    # Jacobian of the norm: (I - 1 1ᵀ / n - normal normalᵀ / n) / deviation.
    of_pairs = of_normal - of_normal.mean() - normal * (of_normal @ normal) / size
    of_pairs = (of_pairs / deviation).reshape(y_NK.shape)
    of_gram = of_pairs @ y_NK.T
    of_x[b] = (of_gram + of_gram.T) @ x[b]
    of_y[... if shared else b] += gram @ of_pairs
  learnt = [g for g, a in ((of_scale, scale), (of_bias, bias)) if a is not None]
  return [out, of_x, of_y, *learnt]


@functools.partial(jax.jit, static_argnums=0)
def run(implementation, x, y, scale, bias, gradient):
  fn = functools.partial(fm_interaction, eps=EPS, implementation=implementation)
  out, vjp = jax.vjp(fn, x, y, scale, bias)
  return out, vjp(gradient)


def results(implementation, inputs, dtype):
  x, y, *learnt, gradient = inputs
  x, y, gradient = (jnp.asarray(a, dtype) for a in (x, y, gradient))
  learnt = [None if a is None else jnp.asarray(a, jnp.float32) for a in learnt]
  out, gradients = run(implementation, x, y, *learnt, gradient)
  for given, gradient in zip((x, y, *learnt), gradients):
    assert given is None or (given.shape, given.dtype) == (gradient.shape, gradient.dtype)
  return [np.asarray(a, np.float64) for a in jax.tree.leaves((out, gradients))]


def difference(got, want):
  """Largest differences, in units of the largest value (or of 0.1, where all should be 0)."""
  assert [a.shape for a in got] == [a.shape for a in want]
  return [np.abs(a - b).max() / max(np.abs(b).max(), 0.1) for a, b in zip(got, want)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_is_the_formula_forward_and_backward(case, implementation):
  *sizes, dtype = CASES[case]
  inputs = draw(*sizes, dtype)
  found = results(implementation, inputs, dtype)
  bound = {"float32": 3e-3 if ON_GPU else 2e-5, "bfloat16": 3e-2, "float16": 4e-3}[dtype]
  assert max(difference(found, oracle(*inputs))) < bound
  if implementation != "reference":
    assert max(difference(found, results("reference", inputs, dtype))) < bound


def test_reference_is_exact_in_float64():
  inputs = draw(3, 13, 5, 20, False, True, "float32")
  with jax.enable_x64(True):
    x, y, scale, bias, gradient = (jnp.asarray(a, jnp.float64) for a in inputs)
    for implementation in ("reference", "xla"):
      found = jax.tree.leaves(run(implementation, x, y, scale, bias, gradient))
      assert max(difference(found, oracle(*inputs))) < 1e-12
    with pytest.raises(Refused, match="float64"):
      fm_interaction(x, y, implementation="triton")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_norm_is_the_models(implementation):
  nnx = pytest.importorskip("flax.nnx", reason="flax, whose LayerNorm Wukong uses, is missing")
  x, y, scale, bias, _ = draw(3, 13, 5, 20, False, True, "float32")
  x, y, scale, bias = (jnp.asarray(a, jnp.float32) for a in (x, y, scale, bias))
  norm = nnx.LayerNorm(65, rngs=nnx.Rngs(0))
  norm.scale[...], norm.bias[...] = scale, bias
  want = norm(jnp.einsum("bnd,bmd,mk->bnk", x, x, y, precision="highest").reshape(3, -1))
  found = fm_interaction(x, y, scale, bias, implementation=implementation)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("units", (13, 70))
def test_means_that_dwarf_the_variance_do_not_cancel(implementation, units):
  x, y, _, _, gradient = draw(2, units, 5, 20, False, False, "float32")
  x = np.float64(np.float32(0.01 * x + 3))  # Pairs of like size: their mean is 50 deviations.
  y = np.float64(np.float32(0.003 * y + 1))
  inputs = (x, y, None, None, gradient)
  found, want = results(implementation, inputs, "float32"), oracle(*inputs)
  assert difference(found[:1], want[:1])[0] < 2e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("attentive", (False, True))
def test_no_examples(implementation, attentive):
  inputs = draw(0, 13, 5, 20, attentive, True, "float32")
  out, of_x, of_y, *learnt = results(implementation, inputs, "float32")
  assert out.shape == (0, 65) and of_x.shape == (0, 13, 20)
  assert not of_y.any() and not any(a.any() for a in learnt)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("units", (13, 70))
def test_nan_stays_in_its_example(implementation, units):
  inputs = draw(3, units, 5, 20, True, True, "float32")
  clean = results(implementation, inputs, "float32")
  inputs[0][1, 2, 3] = np.nan
  dirty = results(implementation, inputs, "float32")
  for before, after in zip(clean[:3], dirty[:3]):
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert np.isnan(after[1]).any()
  assert np.isnan(dirty[0][1]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_examples_do_not_see_each_other(implementation):
  x, y, scale, bias, gradient = draw(3, 13, 5, 20, False, True, "float32")
  order = [2, 0, 1]
  straight = results(implementation, (x, y, scale, bias, gradient), "float32")
  shuffled = results(implementation, (x[order], y, scale, bias, gradient[order]), "float32")
  for a, b in zip(straight[:2], shuffled[:2]):
    np.testing.assert_array_equal(a[order], b)
  assert max(difference(shuffled[2:], straight[2:])) < 1e-6


@pytest.mark.parametrize("units", (13, 70))
def test_programs_of_several_examples_sum_all_of_them(units, monkeypatch):
  """Fewer programs than examples, and turns that do not come out even."""
  monkeypatch.setattr(Tiling, "programs", lambda self, bytes_each: 2)
  inputs = draw(5, units, 3, 17, False, True, "float32")  # A shape of this test: nothing is cached.
  found = results("triton", inputs, "float32")
  assert max(difference(found, oracle(*inputs))) < 2e-5
  for a, b in zip(found, results("triton", inputs, "float32")):
    np.testing.assert_array_equal(a, b)


def test_gradient_of_a_float32_y_is_not_rounded_to_the_units_dtype():
  x, y, _, _, gradient = draw(3, 13, 5, 20, False, False, "bfloat16")
  x, gradient = jnp.asarray(x, jnp.bfloat16), jnp.asarray(gradient, jnp.bfloat16)
  _, (_, of_y, _, _) = run("triton", x, jnp.asarray(y, jnp.float32), None, None, gradient)
  assert of_y.dtype == jnp.float32
  assert (np.asarray(of_y) != np.asarray(of_y.astype(jnp.bfloat16), np.float32)).any()


@pytest.mark.parametrize("size", (1, 15, 16, 17, 39, 48, 96, 160, 192, 384, 720))
@pytest.mark.parametrize("most", (32, 64, 128))
@pytest.mark.parametrize("alike", (False, True))
def test_pieces_cover_an_axis_once(size, most, alike):
  axis = Axis(size, most, alike)
  ends = 0
  for start, length in axis.pieces:
    assert start == ends and length in (16, 32, 64, 128) and length <= most
    assert start % length == 0  # So that a piece lies inside where its size divides the axis.
    ends += length
  assert size <= ends <= 1.1 * (-(-size // 16) * 16)
  assert sum(axis.inside(piece) for piece in axis.pieces) == size
  assert not alike or len({length for _, length in axis.pieces}) == 1


@pytest.mark.parametrize(("units", "cheaper"), ((40, True), (41, False)))
def test_fallback_takes_the_cheaper_association(units, cheaper):
  width, rank = 128, 24  # 2 * 128 * 24 / 152 = 40.4
  gram = 2 * units**2 * (width + rank)
  mixtures = 4 * units * width * rank
  assert (gram < mixtures) == xla.gram_is_cheaper(units, width, rank) == cheaper


X, Y = jnp.zeros((2, 3, 4)), jnp.zeros((3, 5))


@pytest.mark.parametrize(
  ("args", "sentence"),
  (
    ((X[0], Y), r"x must be \(B, N, D\).*is \(3, 4\)"),
    ((X[:, :, :0], Y), r"x must be .*at least 1, is \(2, 3, 0\)"),
    ((X, Y[:2]), r"y must be \(N, K\) or \(B, N, K\) with B = 2, N = 3.*is \(2, 5\)"),
    ((X, Y[:, :0]), r"K at least 1, is \(3, 0\)"),
    ((X, jnp.zeros((3, 3, 5))), r"y must be .*is \(3, 3, 5\)"),
    ((X, Y, jnp.zeros((3, 5))), r"scale must be \(N \* K,\) = \(15,\), is \(3, 5\)"),
    ((X, Y, None, jnp.zeros((14,))), r"bias must be .* = \(15,\), is \(14,\)"),
    ((X.astype(int), Y), r"x must be one of bfloat16.*is int32"),
    ((X, Y.astype(int)), r"y must be one of .*is int32"),
  ),
)
def test_bad_arguments_are_named(args, sentence):
  with pytest.raises(ValueError, match=sentence):
    fm_interaction(*args)


def test_bad_eps_and_implementation_are_named():
  with pytest.raises(ValueError, match="eps must be more than 0, is -1"):
    fm_interaction(X, Y, eps=-1)
  with pytest.raises(Refused, match="'cudnn' is not one of xla, triton, reference"):
    fm_interaction(X, Y, implementation="cudnn")


def test_intermediate_results_do_not_grow_with_the_batch():
  """No (B, K, D) and no (B, N, K) beside the outputs: what a program has of its own is all."""
  paged = shapes.SHAPES["paper_n192_k96_d160"].args()
  for batch in (2048, 8192):
    args = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in paged]
    args[1:4] = paged[1:4]
    jaxpr = jax.make_jaxpr(shapes.backward)(*args)
    (call,) = (e for e in jaxpr.eqns if e.primitive.name == "pallas_call")
    of_x, *own = (v.aval for v in call.outvars)
    assert of_x.shape == args[0].shape
    assert {a.shape[0] for a in own} == {264}


def test_report_cases_cover_both_directions_of_every_shape():
  cases = list(shapes.report_cases())
  assert len(cases) == 2 * len(shapes.SHAPES)
  for case in cases:
    assert len(case.args) == (5 if case.direction == "backward" else 4)
    assert case.kernels == {f"fm_interaction_{case.direction}": True}
  jax.eval_shape(cases[0].fn, *cases[0].args)


def test_bench_rows():
  shares = {}
  for row in bench.rows(quick=True):
    assert row["flops_needed"] <= row["flops_visited"] and row["bytes_needed"] > 0
    assert row["xla_ms"] > 0 and row["padded_ms"] > 0 and row["tiles_visited"] > 0
    shares[row["shape"]] = row["useful_tile_share"]
  assert shares["paper_n192_k96_d160"] == 1
  assert shares["criteo_n16_k8_d16"] == 0.5  # A rank of 8 takes 16 columns.
