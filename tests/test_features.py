"""Feature sets: what is refused, what counts as a difference, and the round trip to JSON."""

import dataclasses
import json

import numpy as np
import pytest

from gemjax.features import Dense, FeatureSet, Sequence, Sparse, event_capacity, split_words

FEATURES = FeatureSet(
  dense=(Dense(name="price", mean=1.5),),
  sparse=(Sparse(name="user", size=9, table="user"), Sparse(name="item", size=7, table="item")),
  sequence=(Sequence(name="history", size=7, table="item", max_length=3),),
  tasks=("click", "buy"),
)


def test_json_keeps_everything():
  again = FeatureSet.from_json(json.loads(json.dumps(FEATURES.to_json())))
  assert again == FEATURES
  assert FEATURES.difference(again) is None
  assert FEATURES.tables == {"user": 9, "item": 7}


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"dense": ()}, "dense feature 'price' is not in the other"),
    ({"dense": (Dense(name="price"),)}, "dense feature 'price' has mean 1.5 here and 0.0"),
    ({"sparse": FEATURES.sparse[::-1]}, "sparse features come in another order"),
    ({"tasks": ("click",)}, "tasks"),
    ({"vocabularies": "abc"}, "vocabularies"),
    ({"grouped": True}, "grouped"),
  ],
)
def test_a_difference_names_the_field(change, words):
  other = dataclasses.replace(FEATURES, **change)
  assert words in FEATURES.difference(other)
  assert other.difference(FEATURES) is not None


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"tasks": ("click", "user")}, r"\['user'\] appear more than once"),
    ({"tasks": ()}, "at least one task"),
    ({"sparse": (Sparse(name="x", size=1, table="x"),)}, "at least 2 rows, got 1"),
    ({"sparse": (Sparse(name="x", size=8, table="item"),)}, "size is 8 for one and 7"),
    (
      {"sparse": (Sparse(name="x", size=2**40 + 1, table="x"),)},
      "'x'.* at most 2.40 rows, got 109",
    ),
  ],
)
def test_impossible_sets_are_refused(change, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(FEATURES, **change)


def test_json_that_is_no_feature_set_is_named():
  tree = FEATURES.to_json()
  del tree["sparse"]
  with pytest.raises(ValueError, match="not a feature set: 'sparse'"):
    FeatureSet.from_json(tree)


def test_capacities_are_few_and_never_too_small():
  capacities = [event_capacity(n) for n in range(5000)]
  assert all(n <= c < max(65, n * 17 / 16) for n, c in enumerate(capacities))
  assert len(set(capacities)) == 101 and capacities == sorted(capacities)  # 64, 68, .., 5120


@pytest.mark.parametrize(("size", "wide"), [(9, False), (2**31, False), (2**31 + 1, True)])
def test_one_table_beyond_int32_makes_all_ids_wide(size, wide):
  sparse = dataclasses.replace(FEATURES.sparse[0], size=size)
  assert dataclasses.replace(FEATURES, sparse=(sparse,)).wide is wide
  sequence = dataclasses.replace(FEATURES.sequence[0], size=size, table="long")
  assert dataclasses.replace(FEATURES, sequence=(sequence,)).wide is wide
  assert FeatureSet(sequence=(sequence,)).id_dtype == (np.int64 if wide else np.int32)
  assert not FeatureSet(dense=FEATURES.dense).wide


def test_words_are_the_low_and_the_high_32_bits():
  numbers = [0, 1, 2**31, 2**32 - 1, 2**32, 5 * 10**9, 2**40 - 1, 2**63 - 1, -1, -(2**63)]
  expected = [[x % 2**32, (x >> 32) % 2**32] for x in numbers]
  words = split_words(np.array(numbers))
  assert words.dtype == np.uint32 and words.tolist() == expected
  grid = np.array(numbers).reshape(2, 5)
  assert split_words(grid.T).tolist() == np.reshape(expected, (2, 5, 2)).swapaxes(0, 1).tolist()
  assert split_words(grid[:, ::2]).tolist() == np.reshape(expected, (2, 5, 2))[:, ::2].tolist()
  assert split_words(np.array([7, -1], np.int32)).tolist() == [[7, 0], [2**32 - 1] * 2]
  assert split_words(np.array(numbers, ">i8")).tolist() == expected
  for shape in ((0,), (3, 0), (0, 3), ()):
    assert split_words(np.zeros(shape, np.int64)).shape == (*shape, 2)
  with pytest.raises(TypeError):
    split_words(np.array([1.5]))
