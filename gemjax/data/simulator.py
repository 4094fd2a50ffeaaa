"""A simulated log of ad impressions whose true click and conversion probabilities are known.

Users, ads and advertisers are drawn from Zipf laws over several days. The click logit of an
impression is a bias, a drift of the day, and a weighted sum of terms of mean 0 and deviation 1:

  first     an effect of each field                   Σ_f w_f[x_f]
  ids       an effect of the user, the ad and the advertiser
  second    tastes of the user's segments for what the ad is   <Σ_f u_f[x_f], Σ_g v_g[x_g]>
  third, fourth   crosses of three and four fields    Σ_r Π_f a_fr[x_f]
  dense     non-linear effects of the dense features
  history   log(1 + clicks of this ad's category among the user's last), less if this ad was clicked

P(conversion) = P(click) P(conversion | click), where the second factor has terms of its own.
Histories are those of the simulated clicks themselves, up to the hour before. `oracle` holds the
two probabilities, so that the NE no model can beat is known. Rare users and ads, and ads that were
launched after the training days, are UNKNOWN to the features.

Letters: n impressions, F dense features, H events of a history, r rank of a cross.
"""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np

from gemjax.data.blocks import Columns
from gemjax.data.prepared import PreparedData, PreparedWriter
from gemjax.features import MISSING, RESERVED, UNKNOWN, Dense, FeatureSet, Sequence, Sparse

FIELDS = {"age": 6, "gender": 3, "region": 8, "device": 4, "category": 12, "format": 4}
FIELDS |= {"hour": 24, "placement": 6, "country": 10, "domain": 2}  # domain: feed, reels
DENSE = ("price", "session_depth", "relevance", "bid", "tenure_days")  # The last may be missing.
CROSSES = {
  "third": (("age", "category", "hour"), ("region", "device", "format")),
  "fourth": (("age", "category", "hour", "domain"),),
}
# Weights of the terms.
CLICK = {"first": 0.45, "ids": 0.3, "second": 0.9, "third": 0.6, "fourth": 0.5}
CLICK |= {"dense": 0.6, "history": 0.7}
CONVERSION = {"first": 0.5, "ids": 0.3, "second": 0.6, "dense": 0.5, "history": 0.4}
CLICK_RATE, CONVERSION_RATE = 0.14, 0.2  # The second one is given a click.
HISTORY = 10
CHUNK = 16_384  # Bounds the memory.
MIN_EXPECTED = 8  # Impressions in the training days below which an id is UNKNOWN.
VERSION = 1


def simulate(
  path: str | os.PathLike,
  *,
  examples: int = 800_000,
  seed: int = 0,
  days: int = 8,
  users: int = 3_000,
  ads: int = 1_200,
  advertisers: int = 100,
) -> PreparedData:
  """Writes `examples` impressions to `path`: the last day is test, the one before it valid.

  The same arguments give the same bytes. Raises ValueError for fewer than 3 days, or fewer
  examples than days.
  """
  if days < 3 or examples < days:
    raise ValueError(
      f"a simulation needs at least 3 days (train, valid, test) with an example each, "
      f"got {days} days and {examples} examples"
    )
  parameters = {k: v for k, v in locals().items() if k != "path"} | {"version": VERSION}
  world = World(seed, days, users, ads, advertisers)
  per_day = np.diff(np.linspace(0, examples, days + 1).astype(int))
  known = world.known(per_day[:-2])
  digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]
  features = world.features(known, digest)
  hours = 1.2 + np.sin(np.arange(-9, 15) / 12 * np.pi)  # Nights are quiet.
  with PreparedWriter(path) as writer:
    for day, count in enumerate(per_day):
      split = {days - 1: "test", days - 2: "valid"}.get(day, "train")
      rng = np.random.default_rng([seed, 2, day])
      for hour, n in enumerate(rng.multinomial(count, hours / hours.sum())):
        for start in range(0, n, CHUNK):
          x = world.impressions(rng, day, np.full(min(CHUNK, n - start), hour))
          writer.add(split, world.columns(rng, day, x, features, known))
    vocabularies = {"user": np.flatnonzero(known["user"]), "ad": np.flatnonzero(known["ad"])}
    return writer.finish(
      features,
      vocabularies={name: ids.tolist() for name, ids in vocabularies.items()},
      origin={"dataset": "demo", **parameters},
    )


class World:
  """The users, the ads, what they do to each other, and the clicks so far."""

  def __init__(self, seed: int, days: int, users: int, ads: int, advertisers: int):
    rng = np.random.default_rng([seed, 0])
    field = lambda name, n: rng.choice(FIELDS[name], n, p=_zipf(FIELDS[name], 0.6))
    self.user = {f: field(f, users) for f in ("age", "gender", "region", "device")}
    self.user["tenure_days"] = rng.exponential(300, users)
    category = field("category", advertisers)
    self.ad = {
      "advertiser": rng.choice(advertisers, ads, p=_zipf(advertisers, 0.8)),
      "format": field("format", ads),
      "price": rng.lognormal(3.0, 0.8, ads),
    }
    # An advertiser sells mostly one thing.
    own = rng.random(ads) < 0.8
    self.ad["category"] = np.where(own, category[self.ad["advertiser"]], field("category", ads))

    self.user_share = _zipf(users, 0.8)
    walk = np.cumsum(rng.normal(0, 0.15, (days, ads)), 0)  # What is popular drifts.
    launch = np.where(rng.random(ads) < 0.2, rng.integers(0, days, ads), 0)
    share = _zipf(ads, 0.9) * np.exp(walk) * (np.arange(days)[:, None] >= launch)
    self.ad_share = share / share.sum(1, keepdims=True)
    self.drift = np.cumsum(rng.normal(0, 0.05, days))

    sizes = FIELDS | {"user": users, "ad": ads, "advertiser": advertisers}
    self.effects = {
      task: {
        "bias": {f: rng.normal(0, 1, size) for f, size in sizes.items()},
        "taste": {f: rng.normal(0, 1, (size, 4)) for f, size in FIELDS.items()},
        "cross": {  # Not of mean 0: a cross casts a shadow on lower orders, by which it is found.
          fields: [rng.normal(0.5, 1, (FIELDS[f], 2)) for f in fields]
          for crosses in CROSSES.values()
          for fields in crosses
        },
      }
      for task in ("click", "conversion")
    }
    part = np.arange(24) // 6 * 6  # Hours act as four parts of the day, not one by one.
    for effects in self.effects.values():
      for fields, factors in effects["cross"].items():
        for f, table in zip(fields, factors):
          table[:] = table[part] if f == "hour" else table

    self.clicked = rng.choice(ads, (users, HISTORY), p=self.ad_share[0])  # Ring buffers.
    self.clicks = rng.integers(0, 3 * HISTORY, users)  # Two thirds of the users fill theirs.
    self._calibrate(np.random.default_rng([seed, 1]))

  def known(self, per_day: np.ndarray) -> dict[str, np.ndarray]:
    """Which users and ads a vocabulary fitted on the training days would hold."""
    ads = per_day @ self.ad_share[: len(per_day)]
    users = self.user_share * per_day.sum()
    return {"user": users >= MIN_EXPECTED, "ad": ads >= MIN_EXPECTED}

  def features(self, known: dict[str, np.ndarray], digest: str) -> FeatureSet:
    """The feature set; a missing tenure and a missing device are values like any other."""
    sizes = {name: int(mask.sum()) for name, mask in known.items()}
    sizes |= {"advertiser": len(self.effects["click"]["bias"]["advertiser"]), **FIELDS}
    sizes["device"] -= 1  # The last device is the one that is missing.
    ad, category = sizes["ad"] + RESERVED, sizes["category"] + RESERVED
    return FeatureSet(
      dense=(*self.dense, Dense(name="tenure_days.missing")),
      sparse=tuple(Sparse(name=f, size=s + RESERVED, table=f) for f, s in sizes.items()),
      sequence=(
        Sequence(name="clicked_ad", size=ad, table="ad", max_length=HISTORY),
        Sequence(name="clicked_category", size=category, table="category", max_length=HISTORY),
      ),
      tasks=("click", "conversion"),
      grouped=True,
      vocabularies=digest,
    )

  def impressions(self, rng: np.random.Generator, day: int, hour: np.ndarray) -> Columns:
    """Who sees what, where and when; `history_nH` holds ads, -1 before the first one."""
    n = len(hour)
    user = rng.choice(len(self.user_share), n, p=self.user_share)
    ad = rng.choice(self.ad_share.shape[1], n, p=self.ad_share[day])
    domain = (rng.random(n) < 0.55 - 0.08 * self.user["age"][user]).astype(int)
    event = self.clicks[user, None] - HISTORY + np.arange(HISTORY)
    return {
      "user": user,
      "ad": ad,
      **{name: column[user] for name, column in self.user.items()},
      **{name: column[ad] for name, column in self.ad.items()},
      "hour": hour,
      "domain": domain,
      "placement": domain * 3 + rng.choice(3, n, p=_zipf(3, 0.6)),
      "country": rng.choice(FIELDS["country"], n, p=_zipf(FIELDS["country"], 0.8)),
      "session_depth": rng.geometric(0.15, n) - 1.0,
      "relevance": rng.beta(2, 2, n),
      "bid": rng.lognormal(0, 0.5, n),
      "tenure_days.missing": rng.random(n) < 0.15,
      "history_nH": np.where(event < 0, -1, self.clicked[user[:, None], event % HISTORY]),
    }

  def columns(
    self,
    rng: np.random.Generator,
    day: int,
    x: Columns,
    features: FeatureSet,
    known: dict[str, np.ndarray],
  ) -> Columns:
    """Draws the labels of impressions, remembers the clicks, and lays out what is written."""
    click = _sigmoid(self._logit("click", x) + self.drift[day])
    conversion = _sigmoid(self._logit("conversion", x))
    clicked = rng.random(len(click)) < click
    converted = clicked & (rng.random(len(click)) < conversion)
    self._remember(x["user"][clicked], x["ad"][clicked])

    rows = {
      name: np.where(mask, RESERVED + np.cumsum(mask) - 1, UNKNOWN) for name, mask in known.items()
    }
    ids = {f.name: x[f.name] + RESERVED for f in features.sparse}
    ids |= {name: row[x[name]] for name, row in rows.items()}
    ids["device"] = np.where(x["device"] == FIELDS["device"] - 1, MISSING, ids["device"])
    happened = x["history_nH"] >= 0
    past = x["history_nH"][happened]
    lengths = happened.sum(1).astype(np.int32)
    return {
      "dense": self._dense(x),
      "ids": np.stack(list(ids.values()), 1).astype(np.int32),
      "label": np.stack([clicked, converted], 1).astype(np.uint8),
      "group": x["user"].astype(np.int32),
      "oracle": np.stack([click, click * conversion], 1).astype(np.float32),
      "clicked_ad.values": rows["ad"][past].astype(np.int32),
      "clicked_ad.lengths": lengths,
      "clicked_category.values": (self.ad["category"][past] + RESERVED).astype(np.int32),
      "clicked_category.lengths": lengths,
    }

  def _terms(self, task: str, x: Columns) -> dict[str, np.ndarray]:
    """The terms of the logit before they are standardised; see the top of the file."""
    effects = self.effects[task]
    taste = lambda *fields: sum(effects["taste"][f][x[f]] for f in fields)
    person = taste("age", "gender", "region", "country")
    offer = taste("category", "format", "domain")
    cross = lambda fields: np.prod([a[x[f]] for f, a in zip(fields, effects["cross"][fields])], 0)
    price, past = np.log(x["price"]) - 3, x["history_nH"]
    appeal = -(price**2) if task == "click" else -1.5 * price  # Bait is clicked, bargains bought.
    tenure = np.where(x["tenure_days.missing"], 0, np.tanh(np.log1p(x["tenure_days"]) - 5))
    attention = 3 / (1 + x["session_depth"]) + 1.5 * (x["relevance"] > 0.6)
    alike = (past >= 0) & (self.ad["category"][past] == x["category"][:, None])
    return {
      "first": sum(effects["bias"][f][x[f]] for f in FIELDS),
      "ids": sum(effects["bias"][f][x[f]] for f in ("user", "ad", "advertiser")),
      "second": (person * offer).sum(1),
      **{o: sum(cross(fields).sum(1) for fields in crosses) for o, crosses in CROSSES.items()},
      "dense": appeal + attention + 1.5 * tenure,
      "history": np.log1p(alike.sum(1)) - 0.8 * (past == x["ad"][:, None]).any(1),
    }

  def _logit(self, task: str, x: Columns) -> np.ndarray:
    scale, bias = self.scale[task]
    terms = self._terms(task, x)
    return bias + sum((terms[name] - mean) * weight for name, (mean, weight) in scale.items())

  def _calibrate(self, rng: np.random.Generator) -> None:
    """Finds on a pilot of the first day what standardises terms and gives the wanted rates."""
    x = self.impressions(rng, 0, rng.integers(0, 24, 2 * CHUNK))
    self.scale, seen = {}, np.ones(len(x["user"]))
    wanted = {"click": (CLICK, CLICK_RATE), "conversion": (CONVERSION, CONVERSION_RATE)}
    for task, (weights, rate) in wanted.items():
      terms = self._terms(task, x)
      scale = {k: (terms[k].mean(), weight / terms[k].std()) for k, weight in weights.items()}
      self.scale[task] = scale, 0.0
      logit, low, high = self._logit(task, x), -10.0, 10.0
      for _ in range(40):
        bias = (low + high) / 2
        too_low = np.average(_sigmoid(logit + bias), weights=seen) < rate
        low, high = (bias, high) if too_low else (low, bias)
      self.scale[task] = scale, bias
      seen = _sigmoid(logit + bias)  # Only a click can convert.
    x["tenure_days"] = np.where(x["tenure_days.missing"], np.nan, x["tenure_days"])
    z = {name: np.log1p(x[name]) for name in DENSE}
    self.dense = tuple(
      Dense(name=n, transform="log1p", mean=float(np.nanmean(z[n])), std=float(np.nanstd(z[n])))
      for n in DENSE
    )

  def _dense(self, x: Columns) -> np.ndarray:
    z_Fn = [(np.log1p(x[f.name]) - f.mean) / f.std for f in self.dense]
    missing = x["tenure_days.missing"]
    z_Fn[-1] = np.where(missing, 0, z_Fn[-1])
    return np.stack([*z_Fn, missing], 1).astype(np.float32)

  def _remember(self, user: np.ndarray, ad: np.ndarray) -> None:
    """Appends the clicks, which are in time order, to the ring buffers of their users."""
    order = np.argsort(user, kind="stable")
    user, ad = user[order], ad[order]
    first = np.searchsorted(user, user)
    rank = np.arange(len(user)) - first  # Number of the click among this user's new ones.
    self.clicked[user, (self.clicks[user] + rank) % HISTORY] = ad  # In order: the last one stays.
    np.add.at(self.clicks, user, 1)


def _zipf(n: int, exponent: float) -> np.ndarray:
  share = np.arange(1, n + 1, dtype=np.float64) ** -exponent
  return share / share.sum()


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))
