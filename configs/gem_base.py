"""GEM at the size of a vertical's foundation: .9 billion dense parameters, for planning.

There is no data for it: three histories as an ads platform has them, organic and ads engagement and
conversions, over power-law tables (`get_features`). `:light` is a quarter as wide.

  python launch/plan.py --config=configs/gem_base.py --topology=h100:4x8
"""

from gemjax import config as c
from gemjax.features import EventColumn, FeatureSet, History, Sparse

FEATURES = 300
ROWS = 1_000_000_000  # Of all tables of single features.
ITEMS, ADVERTISERS = 200_000_000, 10_000_000
# History -> events kept.
LENGTHS = {"organic": 1024, "ads": 512, "conversions": 256}
DOMAINS = 6  # Surfaces; two rows of the table are missing and unknown.


def get_config(variant: str = "full") -> c.Config:
  fine = c.Attention(heads=4, block=64, rope=10000.0, qk_norm=True, time_buckets=32)
  coarse = c.Attention(heads=4, block=512, rope=10000.0, qk_norm=True)
  config = c.Config(
    name="gem_base",
    data=c.Data(path="none: for planning", batch_size=4096, eval_batch_size=4096),
    embedding=c.Embedding(dim=128, dtype="bfloat16", learning_rate=0.1),
    model=c.Gem(
      layers=4,
      fmb_units=48,
      lcb_units=48,
      rank=48,
      mlp=(4096, 4096),
      width=2,
      strides=(1, 8),
      fine=fine,
      coarse=coarse,
      cls=4,
      domain="surface",
      head=(1024, 512),
    ),
    optimizer=c.Optimizer(learning_rate=1e-3, warmup=0.1),
    train=c.Train(dtype="bfloat16"),
  )
  return c.sized(config, variant)


def get_features() -> FeatureSet:
  """`FEATURES` tables, the i-th in proportion to 1 / i, the candidate, and the histories."""
  share = sum(1 / i for i in range(1, FEATURES + 1))
  hashed = lambda name, size: {"name": name, "size": size, "table": name, "encoding": "hash"}
  tables = {f"f{i}": int(ROWS / share / i) + 2 for i in range(1, FEATURES + 1)}
  tables |= {"item": ITEMS, "advertiser": ADVERTISERS, "surface": DOMAINS + 2}
  columns = {"item": ITEMS, "advertiser": ADVERTISERS, "action": 32, "surface": DOMAINS + 2}
  return FeatureSet(
    sparse=tuple(Sparse(**hashed(name, size)) for name, size in tables.items()),
    history=tuple(
      History(
        name=name,
        columns=tuple(EventColumn(**hashed(column, size)) for column, size in columns.items()),
        max_length=length,
      )
      for name, length in LENGTHS.items()
    ),
    tasks=("click", "conversion"),
  )
