"""The world behind the simulated log: users, ads, what they do to each other, the clicks so far.

The law of the clicks is that of simulator.py, of which this is the larger part.
Letters: n impressions, F dense features, H events of a history, r rank of a cross.
"""

from __future__ import annotations

import numpy as np

from gemjax.data.blocks import Columns
from gemjax.features import (
  MISSING,
  RESERVED,
  UNKNOWN,
  Dense,
  EventColumn,
  FeatureSet,
  History,
  Sparse,
)

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
HISTORY = 10  # Last clicks that act on the next one.
LENGTHS = {"clicks": 200, "views": 1000}
PILOT = 32_768  # Impressions that standardise the terms.
BEGIN = 30 * 24  # The log's first hour.
MIN_EXPECTED = 8  # Impressions in the training days below which an id is UNKNOWN.


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
    self._hour: list[tuple[np.ndarray, np.ndarray]] = []  # (user, ad) of this hour's clicks.

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
    rows = {name: size + RESERVED for name, size in sizes.items()} | {"action": 2 + RESERVED}
    column = lambda name: EventColumn(name=name, size=rows[name], table=name)
    names = {
      "clicks": ("ad", "category", "action", "domain"),
      "views": ("ad", "category", "domain"),
    }
    return FeatureSet(
      dense=(*self.dense, Dense(name="tenure_days.missing")),
      sparse=tuple(Sparse(name=f, size=s + RESERVED, table=f) for f, s in sizes.items()),
      history=tuple(
        History(name=h, columns=tuple(map(column, names[h])), max_length=length)
        for h, length in LENGTHS.items()
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
    self._hour.append((x["user"][clicked], x["ad"][clicked]))

    rows = _rows(known)
    ids = {f.name: x[f.name] + RESERVED for f in features.sparse}
    ids |= {name: row[x[name]] for name, row in rows.items()}
    ids["device"] = np.where(x["device"] == FIELDS["device"] - 1, MISSING, ids["device"])
    return {
      "dense": self._dense(x),
      "ids": np.stack(list(ids.values()), 1).astype(np.int32),
      "label": np.stack([clicked, converted], 1).astype(np.uint8),
      "group": x["user"].astype(np.int32),
      "oracle": np.stack([click, click * conversion], 1).astype(np.float32),
      "time": _seconds(BEGIN + day * 24 + x["hour"]),
    }

  def earlier(self, rng: np.random.Generator, known: dict[str, np.ndarray]) -> Columns:
    """The last clicks of the month before the log, as events."""
    event = self.clicks[:, None] - HISTORY + np.arange(HISTORY)
    user, place = np.nonzero(event >= 0)
    ad = self.clicked[user, event[user, place] % HISTORY]
    hour = np.sort(rng.integers(0, BEGIN, event.shape), 1)[user, place]
    return {
      "user": user,
      "time": _seconds(hour),
      "ad": _rows(known)["ad"][ad],
      "category": self.ad["category"][ad] + RESERVED,
      "action": RESERVED + (rng.random(len(user)) < CONVERSION_RATE),
      "domain": RESERVED + (rng.random(len(user)) < 0.55 - 0.08 * self.user["age"][user]),
    }

  def end_hour(self) -> None:
    """From now on the clicks of the hour are past."""
    for clicked in self._hour:
      self._remember(*clicked)
    self._hour.clear()

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
    x = self.impressions(rng, 0, rng.integers(0, 24, PILOT))
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


def _rows(known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The row of every user and ad: those that are known in their order, UNKNOWN for the others."""
  return {n: np.where(m, RESERVED + np.cumsum(m) - 1, UNKNOWN) for n, m in known.items()}


def _seconds(hour: np.ndarray) -> np.ndarray:
  return hour.astype(np.int64) * 3600


def _zipf(n: int, exponent: float) -> np.ndarray:
  share = np.arange(1, n + 1, dtype=np.float64) ** -exponent
  return share / share.sum()


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))
