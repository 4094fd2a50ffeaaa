import math

import pytest

from gemjax.train.stopping import HIGHER_IS_BETTER, BestSoFar


def feed(metric, values):
  best = BestSoFar(metric=metric)
  for step, value in enumerate(values):
    best.update(step, value)
  return best


@pytest.mark.parametrize("metric, higher", HIGHER_IS_BETTER.items())
def test_the_best_is_the_first_extreme(metric, higher):
  values = [0.5, 0.7, 0.7, 0.4, 0.4, 0.6]
  best = feed(metric, values)
  wanted = max(values) if higher else min(values)
  assert (best.value, best.step) == (wanted, values.index(wanted))
  assert best.since == len(values) - 1 - best.step


@pytest.mark.parametrize("undefined", [None, math.nan, math.inf, -math.inf])
def test_an_undefined_value_never_improves(undefined):
  best = feed("ne", [undefined, 0.9, undefined])
  assert (best.step, best.value, best.since) == (1, 0.9, 1)
  assert feed("auc", [undefined, undefined]) == BestSoFar(metric="auc", since=2)


def test_patience_counts_evaluations_without_improvement_and_0_is_for_ever():
  stopped = lambda n, patience: feed("auc", [0.6] + [0.5] * n).stopped(patience)
  assert [stopped(n, 2) for n in range(4)] == [False, False, True, True]
  assert not any(stopped(n, 0) for n in range(9))


def test_it_survives_a_checkpoint():
  best = feed("gauc", [0.5, 0.6, 0.4])
  assert BestSoFar(**best.to_json()) == best
