import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemjax import metrics
from gemjax.features import UNLABELLED
from gemjax.metrics import binned

merge, of_batch = jax.jit(metrics.merge), jax.jit(metrics.of_batch, static_argnames="bins")


def update(sums, *batch):
  return merge(sums, of_batch(*batch, bins=sums.count_PTLK.shape[-1]))


def draw(seed, n, tasks=1, mean=-1.0, std=2.0):
  """Logits whose labels agree with them, so that AUC is well above 1/2."""
  rng = np.random.default_rng(seed)
  logit = rng.normal(mean, std, (n, tasks)).astype(np.float32)
  label = (rng.random((n, tasks)) < np.exp(-np.logaddexp(0, -logit))).astype(np.float32)
  return logit, label


def sums_of(logit, label, weight=None, bins=binned.BINS):
  weight = np.ones(len(logit), np.float32) if weight is None else weight
  return update(metrics.zeros(logit.shape[1], bins=bins), logit, label, weight)


def total(sums):
  return [np.asarray(x, np.float64).sum(0) for x in sums]


def test_result_equals_the_exact_metrics():
  logit, label = draw(0, 4096, 2)
  got = metrics.result(sums_of(logit, label), ["click", "buy"])
  exact = metrics.evaluate_arrays(logit, label, np.zeros(4096), ["click", "buy"])
  for task in exact:
    assert got[task]["loss"] == pytest.approx(exact[task]["log_loss"], rel=1e-6)
    assert got[task]["ne"] == pytest.approx(exact[task]["ne"], rel=1e-6)
    assert got[task]["calibration"] == pytest.approx(exact[task]["calibration"], rel=1e-6)
    assert got[task]["base_rate"] == exact[task]["base_rate"]
    assert got[task]["examples"] == 4096
    assert abs(got[task]["auc_binned"] - exact[task]["auc"]) <= got[task]["auc_error"] + 1e-12
    assert got[task]["auc_error"] < 2e-3


def test_a_task_counts_the_examples_that_have_its_label():
  logit, label = draw(3, 512, 2)
  gone = np.random.default_rng(0).random(label.shape) < 0.4
  group = np.arange(512) % 9
  some = np.where(gone, UNLABELLED, label).astype(np.float32)
  logit[gone[:, 1], 1] = np.inf  # Nothing of an unlabelled example is read.
  got = metrics.result(sums_of(logit, some), ["click", "buy"])
  exact = metrics.evaluate_arrays(logit, some, group, ["click", "buy"])
  for t, task in enumerate(["click", "buy"]):
    mine = ~gone[:, t]
    alone = (x[mine, t : t + 1] for x in (logit, label))
    for own, of in (
      (metrics.result(sums_of(*alone), [task]), got),
      (metrics.evaluate_arrays(logit[mine], label[mine], group[mine], ["click", "buy"]), exact),
    ):
      assert own[task] == pytest.approx(of[task], rel=1e-6)
      assert own[task]["examples"] == mine.sum()


@settings(max_examples=40, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  bins=st.sampled_from([2, 16, 256]),
  mean=st.sampled_from([-9.0, 0.0, 4.0]),
  std=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_binned_auc_is_within_its_stated_error(seed, bins, mean, std):
  logit, label = draw(seed, 512, 1, mean, std)
  label[:2, 0] = 0, 1
  got = metrics.result(sums_of(logit, label, bins=bins), ["click"])["click"]
  assert abs(got["auc_binned"] - metrics.auc(label[:, 0], logit[:, 0])) <= got["auc_error"] + 1e-12


def test_bins_keep_the_order_of_every_logit():
  logit = np.r_[-np.inf, -np.logspace(30, -30, 5000), 0, np.logspace(-30, 30, 5000), np.inf]
  bins = np.asarray(binned._bin(jnp.asarray(logit, jnp.float32), 4096))
  assert (np.diff(bins) >= 0).all()
  assert bins[0] == 0 and bins[-1] == 4095
  fine = np.asarray(binned._bin(jnp.linspace(-8, 8, 100_000), 4096))
  assert len(set(fine.tolist())) >= 2048  # Half of the bins, as the scale promises.


def test_padding_is_left_out_whatever_it_holds():
  logit, label = draw(1, 100)
  weight = np.float32([1] * 60 + [0] * 40)
  logit_padded, label_padded = logit.copy(), label.copy()
  logit_padded[60:], label_padded[60:] = np.nan, np.inf
  got = sums_of(logit_padded, label_padded, weight)
  for a, b in zip(total(got), total(sums_of(logit[:60], label[:60]))):
    np.testing.assert_allclose(a, b, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tasks=st.integers(1, 3))
def test_merge_is_associative_commutative_and_equals_one_pass(seed, tasks):
  logit, label = draw(seed, 96, tasks)
  a, b, c = (sums_of(logit[i : i + 32], label[i : i + 32]) for i in (0, 32, 64))
  left = total(merge(merge(a, b), c))
  right = total(merge(a, merge(c, b)))
  for x, y, z in zip(left, right, total(sums_of(logit, label))):
    np.testing.assert_allclose(x, y, rtol=1e-13)
    np.testing.assert_allclose(x, z, rtol=1e-6)
  order = np.random.default_rng(seed).permutation(96)
  for x, z in zip(total(sums_of(logit[order], label[order])), left):
    np.testing.assert_allclose(x, z, rtol=1e-6)


@pytest.mark.parametrize("updates", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_sums_neither_stop_nor_drift_over_batches_of_4096(updates):
  kinds = 8
  logit, label = draw(2, 4096 * kinds, mean=-4.0, std=1.0)
  logit, label = logit.reshape(kinds, 4096, 1), label.reshape(kinds, 4096, 1)
  weight = jnp.ones(4096)

  @functools.partial(jax.jit, donate_argnums=0)
  def run(sums, logit, label):
    step = lambda i, s: update(s, logit[i % kinds], label[i % kinds], weight)
    return jax.lax.fori_loop(0, updates, step, sums)

  got = metrics.result(run(metrics.zeros(1), jnp.asarray(logit), jnp.asarray(label)), ["click"])
  label, logit = label.reshape(-1), logit.reshape(-1)
  assert got["click"]["examples"] == updates * 4096  # One float32 stops at 1.7e7.
  assert got["click"]["base_rate"] == label.mean(dtype=np.float64)
  assert got["click"]["loss"] == pytest.approx(metrics.log_loss(label, logit), rel=1e-6)
  assert got["click"]["ne"] == pytest.approx(metrics.ne(label, logit), rel=1e-6)
  assert got["click"]["calibration"] == pytest.approx(metrics.calibration(label, logit), rel=1e-6)


def test_counts_are_exact_beyond_what_one_float_holds():
  sums = sums_of(np.zeros((3, 1), np.float32), np.float32([[1], [0], [0]]))
  for _ in range(40):
    sums = merge(sums, sums)
  sums = merge(sums, sums_of(np.zeros((1, 1), np.float32), np.float32([[1]])))
  assert metrics.result(sums, ["click"])["click"]["examples"] == 3 * 2**40 + 1


def test_extreme_logits_give_a_finite_loss():
  logit, label = np.float32([[1e4], [-1e4], [-1e4], [1e4]]), np.float32([[1], [0], [1], [0]])
  got = metrics.result(sums_of(logit, label), ["click"])["click"]
  assert got["loss"] == 5000
  assert got["calibration"] == 1


def test_a_logit_that_is_nan_shows():
  got = metrics.result(sums_of(np.float32([[np.nan], [0]]), np.float32([[1], [0]])), ["click"])
  assert np.isnan(got["click"]["loss"]) and np.isnan(got["click"]["calibration"])
  assert got["click"]["examples"] == 2


@pytest.mark.filterwarnings("error")
def test_empty_and_one_class_are_nan():
  empty = metrics.result(metrics.zeros(1), ["click"])["click"]
  assert empty.pop("examples") == 0
  assert all(np.isnan(v) for v in empty.values())
  for value in (0, 1):
    logit = np.float32([[0.5], [-1]])
    one = metrics.result(sums_of(logit, np.full_like(logit, value)), ["click"])["click"]
    assert np.isnan(one["auc_binned"]) and np.isnan(one["auc_error"]) and np.isnan(one["ne"])
    assert one["base_rate"] == value and one["loss"] > 0
    assert np.isnan(one["calibration"]) == (value == 0)


def test_one_name_a_task():
  with pytest.raises(ValueError, match=r"1 task names \['click'\] for sums of 2"):
    metrics.result(metrics.zeros(2), ["click"])
