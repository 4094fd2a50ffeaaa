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
Its last clicks are the simulated ones themselves, up to the hour before. `oracle` holds the two
probabilities, so that the NE no model can beat is known. Rare users and ads, and ads that were
launched after the training days, are UNKNOWN to the features.

Two histories are stored: `clicks`, with some from the month before the log, whether each converted,
and `views`, all impressions. Times are the log's hours in seconds, so that an example sees
nothing of its own hour.

world.py holds the world, this file the log that is made of it.
"""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np

from gemjax.data.blocks import Columns
from gemjax.data.histories import by_user, locate
from gemjax.data.prepared import PreparedData, PreparedWriter
from gemjax.data.world import World
from gemjax.features import RESERVED, FeatureSet

CHUNK = 16_384  # Impressions drawn at once.
VERSION = 2


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

  The same arguments give the same bytes; memory holds the log, 150 bytes an impression. Raises
  ValueError for fewer than 3 days, or fewer examples than days.
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
  earlier, log = world.earlier(np.random.default_rng([seed, 3]), known), []
  for day, count in enumerate(per_day):
    split = {days - 1: "test", days - 2: "valid"}.get(day, "train")
    rng = np.random.default_rng([seed, 2, day])
    for hour, n in enumerate(rng.multinomial(count, hours / hours.sum())):
      for start in range(0, n, CHUNK):
        x = world.impressions(rng, day, np.full(min(CHUNK, n - start), hour))
        log.append((split, world.columns(rng, day, x, features, known)))
      world.end_hour()
  events = _events([columns for _, columns in log], earlier, features)
  with PreparedWriter(path) as writer:
    for history in features.history:
      found = events[history.name]
      order, offsets = by_user(found["user"], found["time"], users)
      found = {name: x[order] for name, x in found.items()}
      ids = {c.name: found[c.name] for c in history.columns}
      writer.add_history(history, ids, found["time"], offsets)
      for _, columns in log:
        past = locate(offsets, found["time"], columns["group"], columns["time"])
        columns[f"{history.name}.start"], columns[f"{history.name}.stop"] = past
    for split, columns in log:
      writer.add(split, columns)
    vocabularies = {"user": np.flatnonzero(known["user"]), "ad": np.flatnonzero(known["ad"])}
    return writer.finish(
      features,
      vocabularies={name: ids.tolist() for name, ids in vocabularies.items()},
      origin={"dataset": "demo", **parameters},
    )


def _events(log: list[Columns], earlier: Columns, features: FeatureSet) -> dict[str, Columns]:
  """The events of both histories in order of time: all impressions, and those clicked."""
  of = {f.name: s for s, f in enumerate(features.sparse)}
  part = lambda name: np.concatenate([columns[name] for columns in log])
  ids, label = part("ids"), part("label")
  views = {name: ids[:, of[name]] for name in ("ad", "category", "domain")}
  views |= {"user": part("group"), "time": part("time")}
  clicked = label[:, 0] == 1
  clicks = {name: x[clicked] for name, x in views.items()}
  clicks["action"] = RESERVED + label[clicked, 1]
  clicks = {n: np.concatenate([earlier[n].astype(x.dtype), x]) for n, x in clicks.items()}
  clicks["action"] = clicks["action"].astype(np.int32)
  return {"clicks": clicks, "views": views}
