"""Balance by cost: what the stream keeps, and what it wins on lengths that follow Zipf's law."""

import json

import numpy as np
import pytest
from numbered import N, assert_equal, assert_examples, rows, stream
from test_packing import MESHES, join

from gemjax.data import balance
from gemjax.data.balance import alike, groups, halves
from gemjax.data.batches import Batches
from gemjax.data.pipeline import evaluation_batches, train_batches
from gemjax.data.prepared import PreparedWriter
from gemjax.features import EventColumn, FeatureSet, History


def cost(lengths):
  n = lengths["past"].astype(np.float64)
  return 1 + n + n**2 / 20


BALANCED = {"cost": cost, "window_blocks": 3}


def zipf(n, seed=0):
  """Lengths of a heavy tail: most see a handful of events, a few see 2,000."""
  return np.minimum(np.random.default_rng(seed).zipf(1.4, n), 2000)


def unevenness(cost_NB):
  return cost_NB.sum(1).max() / cost_NB.sum(1).mean()


@pytest.mark.parametrize("sizes", [[64] * 16, [10, 64, 64, 64, 37], [5], [1, 1, 1], [100, 1]])
def test_groups_are_a_permutation_of_like_cost(sizes):
  n = sum(sizes)
  cost_n = zipf(n).astype(float)
  order = groups(cost_n[None], sizes, np.random.default_rng(1))
  np.testing.assert_array_equal(np.sort(order), np.arange(n))
  again = groups(cost_n[None], sizes, np.random.default_rng(1))
  np.testing.assert_array_equal(order, again)
  # Fractions of a group take part in few rows: twice the costliest example bounds them as well.
  ends = np.cumsum(sizes)
  for size, end in zip(sizes, ends):
    share = cost_n[order[end - size : end]].sum() - size * cost_n.mean()
    assert abs(share) <= 2 * cost_n.max(), sizes


@pytest.mark.parametrize("seed", range(5))
def test_light_examples_even_out_what_heavy_ones_leave(seed):
  cost_n = zipf(1024, seed).astype(float)
  order = groups(cost_n[None], [64] * 16, np.random.default_rng(seed))
  assert np.ptp(cost_n[order].reshape(16, -1).sum(1)) < 0.3 * cost_n.max()


def test_equal_costs_leave_nothing_but_a_shuffle():
  order = groups(np.ones((1, 1000)), [100] * 10, np.random.default_rng(0))
  assert len({*order[:100].tolist()} & {*range(100)}) < 30


def test_two_groups_are_new_ones_every_time():
  """Of neighbours in cost, always the same would be kept apart."""
  cost_n = np.arange(64.0) ** 2
  deals = [groups(cost_n[None], [32, 32], np.random.default_rng(s)) for s in range(50)]
  assert len({frozenset(d[:32].tolist()) for d in deals}) == 50
  assert len({d[:32].tolist().count(63) + d[:32].tolist().count(62) for d in deals}) > 1


def test_a_history_of_one_example_does_not_decide_what_others_cost():
  rng = np.random.default_rng(0)
  cost_n, rare_n = rng.exponential(1, 1024), np.zeros(1024)
  rare_n[cost_n.argmax()] = 1000
  order = groups(np.stack([cost_n, rare_n]), [128] * 8, rng)
  assert np.ptp(cost_n[order].reshape(8, -1).sum(1)) <= cost_n.max() / 100


@pytest.mark.parametrize("n", [1024, 96, 7, 1])
def test_halves_of_halves_cost_alike(n):
  cost_n = np.random.default_rng(0).exponential(1, n)
  order = halves(cost_n[None])
  np.testing.assert_array_equal(np.sort(order), np.arange(n))
  for parts in (2, 4, 8, 16, 32):
    if n % parts == 0:
      cost_N = cost_n[order].reshape(parts, -1).sum(1)
      assert np.ptp(cost_N) <= cost_n.max(), parts


@pytest.mark.parametrize("kinds", [1, 3])
def test_parts_are_dealt_alike_one_by_one_and_together(kinds, monkeypatch):
  cost_Kn = np.random.default_rng(0).exponential(1, (kinds, 256))
  cost_Kn[-1, ::3] = 0
  found = []
  for many in (1, 10**9):
    monkeypatch.setattr(balance, "MANY", many)
    found.append(halves(cost_Kn))
  np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("shards", [1, 2, 3, 6, 8])
def test_the_quick_order_has_every_example_in_its_shard(shards):
  cost_Kn = np.random.default_rng(0).exponential(1, (3, 96))
  whole, quick = halves(cost_Kn), halves(cost_Kn, shards)
  of_shards = [np.sort(order.reshape(shards, -1), axis=1) for order in (whole, quick)]
  np.testing.assert_array_equal(*of_shards)


def test_each_of_several_histories_is_even():
  """Not only what they cost together: in 64 batches, and in the eighths of each."""
  rng, groups_of, size = np.random.default_rng(0), 64, 128
  n = groups_of * size
  lognormal_n = rng.lognormal(4, 1.2, n).clip(0, 2000).astype(int)
  length_Kn = np.stack([zipf(n), lognormal_n, zipf(n, 1)])
  all_Kn = np.concatenate([length_Kn.sum(0, keepdims=True), length_Kn]).astype(float)

  def most(cost_Kn):
    """Of each history in a batch and in an eighth of one, beside the mean."""
    order_GB = groups(cost_Kn, [size] * groups_of, rng).reshape(groups_of, size)
    dealt_GB = np.stack([order_B[halves(cost_Kn[:, order_B])] for order_B in order_GB])
    np.testing.assert_array_equal(np.sort(dealt_GB, None), np.arange(n))
    length_KGB = length_Kn[:, dealt_GB]
    return (
      max(unevenness(length_NB) for length_NB in length_KGB),
      max(unevenness(length_NB.reshape(-1, size // 8)) for length_NB in length_KGB),
    )

  (batch, eighth), (by_sum, eighth_by_sum) = most(all_Kn), most(all_Kn[:1])
  assert batch < 1.1 < by_sum and eighth < eighth_by_sum


def test_windows_have_some_of_every_part_of_the_file():
  windows = alike(23, 5, np.random.default_rng(0))
  assert sorted(np.concatenate(windows)) == list(range(23))
  assert sorted(map(len, windows)) == [4, 4, 5, 5, 5]
  for window in windows:  # W = 5: one of each five neighbours.
    np.testing.assert_array_equal(window // 5, np.arange(len(window)))


@pytest.mark.parametrize("batch_size", [7, 64, 100, 1000])
def test_every_example_once_in_each_epoch(data, batch_size):
  batches = stream(data, -(-3 * N // batch_size), batch_size=batch_size, **BALANCED)
  # A batch across the border of two epochs is dealt as one: its examples stay, their places not.
  whole = [np.sort(rows([b])) for b in batches]
  for border in (1, 2):
    counts = np.bincount(np.concatenate(whole[: border * N // batch_size]), minlength=N)
    assert border - 1 <= counts.min() and counts.max() <= border
  if N % batch_size == 0:
    epochs = np.concatenate(whole).reshape(3, -1)
    assert (np.sort(epochs, 1) == np.arange(N)).all()


def test_columns_stay_together(data):
  for batch in stream(data, 25, batch_size=90, **BALANCED):
    assert_examples(batch, batch.ids_BS[:, 0].tolist())


def test_seed_and_epoch_decide(data):
  first, again, other = (rows(stream(data, 20, seed=s, **BALANCED)) for s in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert (first == other).mean() < 0.05
  assert (first[:N] == first[N:]).mean() < 0.05


@pytest.mark.parametrize(("shards", "processes"), MESHES)
def test_the_devices_share_out_the_same_batches(data, shards, processes):
  options = {"batch_size": 128} | BALANCED
  whole = stream(data, 20, **options)
  mesh = {"process_count": processes, "shards": shards}
  shared = [stream(data, 20, **options, **mesh, process_index=p) for p in range(processes)]
  for expected, *parts in zip(whole, *shared):
    assert len({p.histories["past"].age_E.shape for p in parts}) == 1
    assert_equal(join(parts)[:6], expected[:6])


@pytest.mark.parametrize("done", [1, 9, 17])
def test_resumes_at_the_exact_example(data, done):
  whole = stream(data, 25, **BALANCED)
  first, second = (iter(train_batches(data, batch_size=100, seed=1, **BALANCED)) for _ in range(2))
  for _ in range(done):
    next(first)
  second.set_state(json.loads(json.dumps(first.get_state())))
  for expected in whole[done:]:
    assert_equal(next(second), expected)
  first.close()
  second.close()


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
  """16,384 examples, each of a user of its own with a past of Zipf's law, longer and longer."""
  lengths = np.minimum(zipf(1 << 14) * np.linspace(1, 3, 1 << 14), 2000).astype(np.int64)
  offsets = np.append(0, np.cumsum(lengths))
  column = EventColumn(name="item", size=5, table="item")
  history = History(name="past", columns=(column,), max_length=2000)
  with PreparedWriter(tmp_path_factory.mktemp("heavy") / "p", block_size=512) as writer:
    zeros = np.zeros(offsets[-1], np.int64)
    writer.add_history(history, {"item": zeros.astype(np.int32)}, zeros, offsets)
    columns = {
      "label": np.zeros((1 << 14, 1), np.uint8),
      "time": np.ones(1 << 14, np.int64),
      "past.start": offsets[:-1],
      "past.stop": offsets[1:],
    }
    writer.add("train", columns)
    return writer.finish(FeatureSet(history=(history,)), origin={})


def evaluated(data, **options):
  """The batches of an evaluation."""
  return list(evaluation_batches(data, "train", **{"cost": cost, "window_blocks": 3} | options))


@pytest.mark.parametrize("batch_size", [1, 64, 304, 1000, 1500])
def test_evaluation_has_every_example_once_in_batches_of_equally_many(data, batch_size):
  batches, seen = evaluated(data, batch_size=batch_size), []
  assert len(batches) == -(-N // batch_size)
  for batch in batches:
    real = batch.weight_B == 1
    assert abs(real.sum() - N / len(batches)) < 1 and len(real) == batch_size
    lists = lambda x, real=real: x._replace(lengths_B=x.lengths_B[real])
    mine = batch._replace(
      **{n: x[real] for n, x in batch._asdict().items() if not isinstance(x, dict)},
      sequences={n: lists(x) for n, x in batch.sequences.items()},
      histories={n: lists(x) for n, x in batch.histories.items()},
    )
    assert_examples(mine, mine.ids_BS[:, 0].tolist())
    seen += mine.ids_BS[:, 0].tolist()
    for x in (*batch.sequences.values(), *batch.histories.values()):
      assert not x.lengths_B[~real].any()
    for x in (batch.dense_BF, batch.ids_BS, batch.label_BT, batch.weight_B, batch.group_B + 1):
      assert not x[~real].any()
  assert sorted(seen) == list(range(N))


@pytest.mark.parametrize(("shards", "processes"), MESHES)
def test_devices_evaluate_the_same_batches_alike(data, shards, processes):
  whole = evaluated(data, batch_size=304)
  mesh = {"process_count": processes, "shards": shards}
  shared = [evaluated(data, batch_size=304, **mesh, process_index=p) for p in range(processes)]
  for expected, *parts in zip(whole, *shared, strict=True):
    assert len({p.histories["past"].age_E.shape for p in parts}) == 1
    assert_equal(join(parts)[:6], expected[:6])
    real_N = expected.weight_B.reshape(shards, -1).sum(1)
    assert np.ptp(real_N) <= np.log2(shards)


def test_evaluation_uses_its_slots(heavy):
  used = {}
  for name, by in (("file order", None), ("dealt", cost)):
    past = [b.histories["past"] for b in evaluated(heavy, batch_size=3072, shards=8, cost=by)]
    assert len(past) == 6
    used[name] = sum(p.lengths_B.sum() for p in past) / sum(len(p.age_E) for p in past)
    programs = len({p.age_E.shape for p in past})
  assert used["file order"] < 0.75 and used["dealt"] > 0.92 and programs <= 2, used


def test_shards_cost_alike_and_slots_are_used(heavy):
  shards, seen = 8, {}
  for name, by in (("random", None), ("balanced", cost)):
    batches = Batches(heavy, "train", 1024, 0, 16, shards=shards, cost=by)
    past = [batches[t].histories["past"] for t in range(48)]
    uneven = [unevenness(cost({"past": p.lengths_B}).reshape(shards, -1)) for p in past]
    sums = [p.lengths_B.sum() for p in past]
    used = sum(sums) / sum(len(p.age_E) for p in past)
    seen[name] = np.mean(uneven), used, len({p.age_E.shape for p in past}), np.ptp(sums)
  (random, r_used, _, r_spread), (balanced, b_used, programs, b_spread) = seen.values()
  assert random > 1.4 and balanced < 1.02
  assert r_used < 0.7 and b_used > 0.9
  assert programs == 1
  assert b_spread < 0.3 * r_spread
