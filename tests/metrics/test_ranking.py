"""Ranks and their metrics against lists sorted by hand."""

import math

import numpy as np
import pytest

from gemjax.metrics.ranking import ranking, ranks


def brute_rank(scores, target):
  """Place of the target in a list sorted from the best, behind all that are as good."""
  order = sorted(range(len(scores)), key=lambda v: (-scores[v], v == target))
  return 1 + order.index(target)


def test_ranks_among_ties():
  rng = np.random.default_rng(0)
  score_BV = rng.integers(0, 6, (50, 12)).astype(np.float32)  # Half of all items are tied.
  target_B = rng.integers(0, 12, 50).astype(np.int32)
  want = [brute_rank(list(score_V), t) for score_V, t in zip(score_BV, target_B)]
  assert len(set(want)) > 8
  np.testing.assert_array_equal(ranks(score_BV, target_B), want)


def test_an_item_left_out_takes_no_rank():
  score_BV = np.array([[5.0, 4.0, 3.0, 2.0], [-np.inf, 4.0, 3.0, 2.0]], np.float32)
  np.testing.assert_array_equal(ranks(score_BV, np.array([2, 2])), [3, 2])


def test_no_number_is_ranked_last():
  score_BV = np.array([[np.nan, 4.0, 3.0], [1.0, np.nan, 3.0]], np.float32)
  np.testing.assert_array_equal(ranks(score_BV, np.array([0, 2])), [3, 2])


def test_means_of_ranks():
  rank_N = [1, 3, 10, 11, 50, 51]
  found = ranking(np.array(rank_N))
  assert found["hr@10"] == pytest.approx(3 / 6)
  assert found["hr@50"] == pytest.approx(5 / 6)
  gains = [1 / math.log2(r + 1) for r in rank_N if r <= 10]
  assert found["ndcg@10"] == pytest.approx(sum(gains) / 6)
  assert found["mrr"] == pytest.approx(sum(1 / r for r in rank_N) / 6)
