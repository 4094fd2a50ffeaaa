"""Wukong at the size the paper trains inside Meta (arXiv 2403.02545, section 5): 720 features,
d = 160, 8 layers of 96/96 units, k = 96, MLP 3 x 8192, batch 262,144, 627 billion table parameters.

There is no data for it: it is for planning, on a machine without a GPU.

  python launch/plan.py --config=configs/wukong_paper.py --topology=h100:16x8 --mesh=1x128
  python launch/plan.py --config=configs/wukong_paper.py --topology=h100:32x8 --mesh=1x256

The paper gives neither the sizes of the tables nor the schedule: rows follow a power law (ours),
the rest is its Criteo recipe.
"""

from gemjax import config as c
from gemjax.features import FeatureSet, Sparse

FEATURES = 720
ROWS = 627_000_000_000 // 160  # 3,918,750,000: more than 2^31.


def get_config() -> c.Config:
  return c.Config(
    name="wukong_paper",
    data=c.Data(path="none: for planning", batch_size=262_144, eval_batch_size=262_144),
    embedding=c.Embedding(dim=160, dtype="bfloat16", learning_rate=0.1),
    model=c.Wukong(
      layers=8, fmb_units=96, lcb_units=96, rank=96, mlp=(8192, 8192, 8192), head=(8192,)
    ),
    optimizer=c.Optimizer(learning_rate=1e-3, warmup=0.1),
    train=c.Train(dtype="bfloat16"),
    # All that follow the first: as planned on 128 H100s 80.7 ms a step, in a loop 97.2.
    compilation=c.Compilation(unroll=7),
  )


def get_features() -> FeatureSet:
  """720 tables, the i-th of them in proportion to 1 / i."""
  share = sum(1 / i for i in range(1, FEATURES + 1))
  sizes = [int(ROWS / share / i) for i in range(1, FEATURES + 1)]
  sizes[0] += ROWS - sum(sizes)
  return FeatureSet(
    sparse=tuple(
      Sparse(name=f"f{i}", size=size, table=f"f{i}", encoding="hash")
      for i, size in enumerate(sizes)
    )
  )
