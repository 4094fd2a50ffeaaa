import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemjax import metrics


def naive_auc(label, score):
  """O(n^2), by the definition."""
  positive, negative = score[label == 1], score[label == 0]
  if not len(positive) or not len(negative):
    return float("nan")
  wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
  return wins / (len(positive) * len(negative))


def naive_gauc(group, label, score):
  total = weight = 0.0
  for user in set(group[group >= 0].tolist()):
    mine = group == user
    value = naive_auc(label[mine], score[mine])
    if not np.isnan(value):
      total += mine.sum() * value
      weight += mine.sum()
  return total / weight if weight else float("nan")


def draw(seed, n, levels=10, users=7):
  rng = np.random.default_rng(seed)
  label = (rng.random(n) < 0.3).astype(np.float32)
  score = (rng.integers(0, levels, n) + label).astype(np.float32)  # Few levels: many ties.
  return rng.integers(-1, users, n).astype(np.int32), label, score


@pytest.mark.parametrize("levels", [1, 3, 10_000])
def test_auc_and_gauc_equal_the_definition(levels):
  group, label, score = draw(levels, 300, levels)
  assert metrics.auc(label, score) == pytest.approx(naive_auc(label, score), abs=1e-13)
  expected = naive_gauc(group, label, score)
  assert metrics.gauc(group, label, score) == pytest.approx(expected, abs=1e-13)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 60), users=st.integers(1, 20))
def test_gauc_equals_the_loop_over_users(seed, n, users):
  group, label, score = draw(seed, n, users=users)
  got, expected = metrics.gauc(group, label, score), naive_gauc(group, label, score)
  assert got == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 80))
def test_order_of_examples_and_monotone_maps_change_nothing(seed, n):
  group, label, score = draw(seed, n)
  auc, gauc = metrics.auc(label, score), metrics.gauc(group, label, score)
  order = np.random.default_rng(seed).permutation(n)
  np.testing.assert_equal(metrics.auc(label[order], score[order]), auc)
  np.testing.assert_allclose(
    metrics.gauc(group[order], label[order], score[order]), gauc, rtol=1e-14
  )
  np.testing.assert_equal(metrics.auc(label, np.arctan(score.astype(np.float64)) * 3 - 1), auc)
  np.testing.assert_allclose(metrics.auc(label, -score), 1 - auc, rtol=0, atol=1e-14)


def test_user_ids_need_not_be_dense_and_minus_one_is_nobody():
  label, score = np.array([0, 1, 1, 0, 0, 1]), np.array([1.0, 2, 3, 4, 5, 0])
  group = np.array([2**31 - 1, 2**31 - 1, 5, 5, -1, -1])
  assert metrics.gauc(group, label, score) == 0.5  # One user 1.0, one 0.0, two examples each.
  assert np.isnan(metrics.gauc(np.full(6, -1), label, score))
  assert np.isnan(metrics.gauc(np.arange(6), label, score))


def test_log_loss_ne_and_calibration_equal_their_formulas():
  rng = np.random.default_rng(0)
  logit = rng.normal(-1, 2, 5000)
  label = (rng.random(5000) < 0.2).astype(np.uint8)
  q = 1 / (1 + np.exp(-logit))
  loss = -(label * np.log(q) + (1 - label) * np.log(1 - q)).mean()
  p = label.mean()
  entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
  assert metrics.log_loss(label, logit) == pytest.approx(loss, rel=1e-12)
  assert metrics.ne(label, logit) == pytest.approx(loss / entropy, rel=1e-12)
  assert metrics.calibration(label, logit) == pytest.approx(q.sum() / label.sum(), rel=1e-12)
  base = np.full(5000, np.log(p / (1 - p)))
  assert metrics.ne(label, base) == pytest.approx(1, rel=1e-12)


def test_extreme_logits_stay_finite():
  logit, label = np.float32([1e4, -1e4, -1e4, 1e4]), np.array([1, 0, 1, 0])
  assert metrics.log_loss(label, logit) == 5000
  assert metrics.calibration(label, logit) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("label", [[], [0, 0, 0], [1, 1]])
def test_undefined_is_none_and_json_safe(label):
  label = np.array(label, np.float32)[:, None]
  group = np.zeros(len(label), np.int32)
  got = metrics.evaluate_arrays(label, label, group, ["click"], np.full(label.shape, 0.5))["click"]
  assert got["auc"] is got["gauc"] is got["ne"] is got["bayes_ne"] is None
  assert got["examples"] == len(label)
  json.dumps(got, allow_nan=False)


def test_evaluate_arrays_by_task():
  group, label, score = draw(3, 400)
  both = np.stack([label, 1 - label], 1)
  logits = np.stack([score - 5, score - 5], 1)
  oracle = np.stack([np.full(400, 0.3), np.clip(label, 0.1, 0.9)], 1)
  got = metrics.evaluate_arrays(logits, both, group, ["click", "skip"], oracle)
  assert got["click"]["auc"] == pytest.approx(naive_auc(label, score))
  assert got["skip"]["auc"] == pytest.approx(1 - naive_auc(label, score))
  assert got["click"]["gauc"] == pytest.approx(naive_gauc(group, label, score))
  p = label.mean(dtype=np.float64)
  entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
  loss = -(p * np.log(0.3) + (1 - p) * np.log(0.7))
  assert got["click"]["bayes_ne"] == pytest.approx(loss / entropy)
  assert got["skip"]["bayes_ne"] == pytest.approx(-np.log(0.1) / entropy)
  assert got["click"]["examples"] == 400
  empty = np.zeros((400, 0), np.float32)
  unknown = metrics.evaluate_arrays(logits, both, group, ["click", "skip"], empty)
  assert "bayes_ne" not in unknown["click"]


@pytest.mark.parametrize(
  ("label", "logit", "oracle", "words"),
  [
    (0.5, 0.0, 0.5, "task 'click': labels must be 0 or 1, got 0.5"),
    (np.nan, 0.0, 0.5, "task 'click': labels must be 0 or 1, got nan"),
    (1.0, np.nan, 0.5, "task 'click': 1 of 2 scores are nan"),
    (1.0, 0.0, 1.5, "task 'click': oracle outside"),
    (1.0, 0.0, np.nan, "task 'click': oracle outside"),
  ],
)
def test_bad_values_are_refused_by_name(label, logit, oracle, words):
  group = np.zeros(2, np.int32)
  column = lambda x: np.array([[x], [0.0]])
  with pytest.raises(ValueError, match=words):
    metrics.evaluate_arrays(column(logit), column(label), group, ["click"], column(oracle))
