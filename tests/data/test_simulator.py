"""The simulated log against its own oracle, and against a replay in plain Python."""

import collections

import numpy as np
import pytest

from gemjax.data.pipeline import evaluation_batches
from gemjax.data.simulator import simulate
from gemjax.data.world import HISTORY, LENGTHS
from gemjax.features import MISSING, RESERVED, UNKNOWN

EXAMPLES, DAYS = 60_000, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("simulated") / "log"
  return simulate(path, examples=EXAMPLES, days=DAYS, seed=3, users=400, ads=300)


def whole(data, split):
  (batch,) = evaluation_batches(data, split, batch_size=data.split(split).examples)
  return batch


@pytest.fixture(scope="module")
def log(data):
  """Split -> its only batch; a day is EXAMPLES / DAYS examples, in order."""
  return {split: whole(data, split) for split in ("train", "valid", "test")}


def column(data, batch, name):
  return batch.ids_BS[:, [f.name for f in data.features.sparse].index(name)]


def ne(probability, label):
  """Cross-entropy over that of the constant mean label."""
  h = lambda p, y: -(y * np.log(p) + (1 - y) * np.log1p(-p)).mean()
  probability, label = probability.astype(np.float64), label.astype(np.float64)
  return h(probability, label) / h(label.mean(), label)


def assert_calibrated(probability, label):
  p = probability.astype(np.float64)
  # Bernstein: P(|sum of labels - sum of p| > slack) < 1e-6, for rare events as well.
  t = np.log(2e6)
  slack = t / 3 + np.sqrt(t**2 / 9 + 2 * t * (p * (1 - p)).sum())
  assert abs(label.sum() - p.sum()) < slack


def files(path):
  return {p.name: p.read_bytes() for p in path.iterdir()}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    simulate(tmp_path / name, examples=9_000, seed=seed)
  a, b, c = (files(tmp_path / name) for name in "abc")
  assert a == b
  assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)


def test_the_digest_tells_worlds_apart(tmp_path):
  one = simulate(tmp_path / "1", examples=3_000, seed=0).features
  two = simulate(tmp_path / "2", examples=3_000, seed=1).features
  assert one.vocabularies != two.vocabularies


def test_splits_are_days(data):
  sizes = {name: split.examples for name, split in data.splits.items()}
  assert sizes == {"train": EXAMPLES * 4 // 6, "valid": EXAMPLES // 6, "test": EXAMPLES // 6}


def test_a_conversion_needs_a_click(log):
  for batch in log.values():
    assert (batch.label_BT[:, 1] <= batch.label_BT[:, 0]).all()
    assert (batch.oracle_BT[:, 1] < batch.oracle_BT[:, 0]).all()
    assert (batch.oracle_BT > 0).all() and (batch.oracle_BT < 1).all()


def test_rates_are_those_of_ads(log):
  clicks, conversions = log["train"].label_BT.mean(0)
  assert 0.10 < clicks < 0.20 and 0.02 < conversions < 0.05


def test_the_oracle_is_calibrated_by_day_and_domain_and_in_every_decile(data, log):
  for batch in log.values():
    domain = column(data, batch, "domain")
    day = np.arange(len(domain)) // (EXAMPLES // DAYS)
    for task in range(2):
      p, y = batch.oracle_BT[:, task], batch.label_BT[:, task]
      groups = [(day == d) & (domain == k) for d in set(day) for k in set(domain)]
      decile = np.searchsorted(np.quantile(p, np.arange(0.1, 1, 0.1)), p)
      for group in groups + [decile == d for d in range(10)]:
        assert group.any()
        assert_calibrated(p[group], y[group])


def test_the_oracle_beats_the_constant_and_every_single_feature(data, log):
  test, train = log["test"], log["train"]
  best = ne(test.oracle_BT[:, 0], test.label_BT[:, 0])
  assert 0.65 < best < 0.82
  assert ne(test.oracle_BT[:, 1], test.label_BT[:, 1]) < 0.85
  for f in data.features.sparse:
    # The smoothed rate of each value in the training days, as a predictor.
    ids, mean = column(data, train, f.name), train.label_BT[:, 0].mean()
    clicks = np.bincount(ids, train.label_BT[:, 0], f.size) + 20 * mean
    rate = clicks / (np.bincount(ids, minlength=f.size) + 20)
    single = ne(rate[column(data, test, f.name)], test.label_BT[:, 0])
    assert best + 0.1 < single < 1.02, f.name


def test_days_drift(data, log):
  """The most frequent ads of the first day are others on the last."""
  per_day = EXAMPLES // DAYS
  top = lambda ids: set(np.argsort(-np.bincount(ids, minlength=400))[:30])
  first = top(column(data, log["train"], "ad")[:per_day])
  second = top(column(data, log["train"], "ad")[per_day : 2 * per_day])
  last = top(column(data, log["test"], "ad"))
  assert len(first & last) < len(first & second)
  assert len(first & last) < 25


def test_popularity_is_skewed(data, log):
  for name in ("user", "ad", "advertiser"):
    counts = np.sort(np.bincount(column(data, log["train"], name)[:]))[::-1]
    assert counts[: len(counts) // 10].sum() > 0.3 * counts.sum(), name


def test_histories_are_what_happened_before_this_hour(data, log):
  """Replays the log: the last events are the user's last clicks and impressions, with their age."""
  past = {name: collections.defaultdict(list) for name in LENGTHS}
  whole, now, pending, earlier = 0, -1, [], 0
  for split in ("train", "valid", "test"):
    batch = log[split]
    hours, ad, category, domain = (
      column(data, batch, name) for name in ("hour", "ad", "category", "domain")
    )
    ends = {name: np.cumsum(batch.histories[name].lengths_B) for name in LENGTHS}
    for i in range(len(ad)):
      if i == 0 or hours[i] != hours[i - 1]:
        for name, user, event in pending:
          past[name][user].append(event)
        pending, now = [], now + 1
      user = batch.group_B[i]
      for name, length in LENGTHS.items() if i % 29 == 0 else ():
        ids_EC, age_E, lengths_B = batch.histories[name]
        expected = past[name][user][-length:]
        n = len(expected)
        # Clicks may reach back to before the log, by HISTORY at most.
        assert n <= lengths_B[i] <= min(n + (HISTORY if name == "clicks" else 0), length)
        earlier += lengths_B[i] - n
        events = slice(ends[name][i] - n, ends[name][i])
        assert [tuple(x) for x in ids_EC[events].tolist()] == [e[1:] for e in expected]
        assert age_E[events].tolist() == [3600 * (now - e[0]) for e in expected]
        before = age_E[ends[name][i] - lengths_B[i] : ends[name][i] - n]
        assert (before > 3600 * now).all()
        whole += n == length
      of_ad = (now, ad[i], category[i])
      pending.append(("views", user, (*of_ad, domain[i])))
      if batch.label_BT[i, 0]:
        action = RESERVED + int(batch.label_BT[i, 1])
        pending.append(("clicks", user, (*of_ad, action, domain[i])))
  assert whole > 100 and earlier > 100


def test_clicks_follow_the_history(data, log):
  """Impressions whose category is among the user's last clicks are clicked more often."""
  batch = log["train"]
  events = batch.histories["clicks"]
  owner = np.repeat(np.arange(len(events.lengths_B)), events.lengths_B)
  category = column(data, batch, "category")
  last = np.cumsum(events.lengths_B)[owner] - np.arange(len(owner)) <= HISTORY
  same = (events.ids_EC[: len(owner), 1] == category[owner]) & last
  matches = np.bincount(owner[same], minlength=len(category))
  click = batch.label_BT[:, 0]
  assert click[matches >= 2].mean() > 1.3 * click[matches == 0].mean()


def test_reserved_rows_are_used(data, log):
  for split in ("train", "test"):
    ad, device = (column(data, log[split], name) for name in ("ad", "device"))
    assert (ad == UNKNOWN).any() and not (ad == MISSING).any()
    assert (device == MISSING).any() and not (device == UNKNOWN).any()
  seen = np.unique(column(data, log["train"], "ad"))
  size = next(f.size for f in data.features.sparse if f.name == "ad")
  assert len(seen) > 0.9 * (size - RESERVED)  # What has a row was nearly always seen.


def test_dense_features_are_standardised_and_missing_ones_are_told(data, log):
  names = [f.name for f in data.features.dense]
  dense = log["train"].dense_BF.astype(np.float64)
  missing = dense[:, names.index("tenure_days.missing")]
  assert set(missing) == {0, 1} and 0.1 < missing.mean() < 0.2
  assert (dense[missing == 1, names.index("tenure_days")] == 0).all()
  for name in names[:-1]:
    z = dense[:, names.index(name)]
    z = z[missing == 0] if name == "tenure_days" else z
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1, name


def test_too_few_days(tmp_path):
  with pytest.raises(ValueError, match="at least 3 days"):
    simulate(tmp_path / "x", examples=1_000, days=2)
  assert not (tmp_path / "x").exists()
