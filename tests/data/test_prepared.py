"""Gathering examples of columns, jagged ones too, against loops."""

import itertools

import numpy as np
import pytest
from numbered import columns, h

from gemjax.data.prepared import concatenate, examples, take


@pytest.mark.parametrize("seed", range(5))
def test_take_and_concatenate_against_loops(seed):
  rng = np.random.default_rng(seed)
  whole = columns(range(200))
  mask = rng.random(200) < 0.3
  picks = (
    rng.integers(0, 200, 80),  # With repetitions.
    np.array([], int),
    slice(*sorted(rng.integers(0, 201, 2).tolist())),
    slice(5, 5),
    mask,
  )
  for index in picks:
    expected = [h(i) for i in np.arange(200)[index]]
    got = take(whole, index)
    assert got["h.values"].tolist() == [*itertools.chain(*expected)]
    assert got["h.lengths"].tolist() == [len(x) for x in expected]
    np.testing.assert_array_equal(got["ids"], whole["ids"][index])
    assert examples(got) == len(expected)
  cuts = [0, *np.sort(rng.integers(0, 200, 3)).tolist(), 200]
  joined = concatenate([take(whole, slice(a, b)) for a, b in itertools.pairwise(cuts)])
  for name, column in whole.items():
    np.testing.assert_array_equal(joined[name], column)
