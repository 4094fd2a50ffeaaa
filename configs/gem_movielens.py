"""GEM, its parts, and rankers to compare it with, on MovieLens: rating >= 4 with the user's past.

The user's own id is left out of every model: split by time, 86 % of ML-100K's test examples are of
users that training never saw, and what a model has memorised about the others hides their past.

  python launch/train.py --config=configs/gem_movielens.py --workdir=runs/gem_ml \
    --config.data.path=RAW_OR_PREPARED

Events' ages are left out, too: users of ML-1M come within months and return years later, at ages
that training hardly saw (WORKSPACE.md has figures).

README.md has the test NE and AUC of all, on ML-100K with the last 30 events and on ML-1M with
`--config.data.history=200`.
"""

import dataclasses

from gemjax.config import (
  Attention,
  Config,
  ConfigError,
  Data,
  Din,
  Embedding,
  Gem,
  Hstu,
  InterFormer,
  Mlp,
  Optimizer,
  Sasrec,
  Train,
  Wukong,
  light,
)

INTERACTION = {
  "fmb_units": 8,
  "lcb_units": 8,
  "rank": 8,
  "mlp": (128,),
  "head": (128,),
}
FINE = Attention(block=256, rope=10000.0, qk_norm=True)
COARSE = Attention(block=512, rope=10000.0, qk_norm=True)
GEM = Gem(
  layers=1,
  **(INTERACTION | {"mlp": (64,)}),
  memory_units=2,
  strides=(1, 8),
  fine=FINE,
  coarse=COARSE,
  cls=2,
  pma=1,
  recent=1,
)
MODELS = {
  "gem": GEM,
  "wukong": Wukong(layers=2, **INTERACTION),  # With pooled history.
  "mlp": Mlp(head=(128, 128)),  # With pooled history, too.
  "din": Din(head=(128, 128)),
  "sasrec": Sasrec(layers=1, hidden=64, head=(128, 128)),
  "hstu": Hstu(layers=1, head=(128, 128)),
  "interformer": InterFormer(layers=1, rank=8, mlp=(128,), head=(128,)),
}
# GEM without one of its parts, or with another.
ABLATIONS = {
  "no_towers": {"strides": ()},
  "no_coarse": {"strides": (1,)},
  "no_fine": {"strides": (8,), "recent": 0},
  "no_exchange": {"exchange": False},
  "no_personalised": {"personalised": False},
  "no_memory": {"memory_units": 0},
  "no_cross": {"cross": False},
  "next_event": {"next_event": 0.1},  # The better one on both, at 4 / 3 of the cost.
  "sum_mlp": {"sum_mlp": True},  # The better one by valid on ML-1M, not on ML-100K.
  "gating": {"gating": "sigmoid"},
  "no_target": {"target": False},
  "no_interest": {"interest": 0},
  "no_pma": {"pma": 0},
  "no_recent": {"recent": 0},
  "no_pooled": {"pooled": False},
  "no_skip": {"skip": False},
  "no_gain": {"gain": 1.0},
  "hstu_cell": {"cell": "hstu"},
  "width_2": {"width": 2},
  "layers_2": {"layers": 2},
  "no_block": {"fine": dataclasses.replace(FINE, block=0)},  # Another beyond 256 events.
  "no_qk_norm": {
    "fine": dataclasses.replace(FINE, qk_norm=False),
    "coarse": dataclasses.replace(COARSE, qk_norm=False),
  },
  "no_rope": {
    "fine": dataclasses.replace(FINE, rope=0.0),
    "coarse": dataclasses.replace(COARSE, rope=0.0),
  },
}


def _own(model) -> dict:
  """Sections of the model as objects of its own: a flag shall change one."""
  sections = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
  return {n: dataclasses.replace(a) for n, a in sections.items() if isinstance(a, Attention)}


def get_config(variant: str = "gem") -> Config:
  """`:din` trains a baseline with the same recipe, `:no_memory` GEM without a part, `:light` a
  light GEM.
  """
  if variant not in (*MODELS, *ABLATIONS, "light"):
    raise ConfigError(f"variant {variant!r} is none of {[*MODELS, *ABLATIONS, 'light']}")
  model = MODELS.get(variant) or dataclasses.replace(GEM, **ABLATIONS.get(variant, {}))
  config = Config(
    name="movielens_gem" if variant == "light" else f"movielens_{variant}",
    data=Data(path="movielens", batch_size=512, history=30, window_blocks=32),
    embedding=Embedding(dim=16, units={"user": 0}, ages=False, learning_rate=0.02, l2=0.05),
    model=dataclasses.replace(model, **_own(model)),
    optimizer=Optimizer(learning_rate=3e-3, warmup=0.1, schedule="linear"),
    train=Train(epochs=3, eval_every=0.5, stop_metric="ne"),
  )
  return light(config) if variant == "light" else config
