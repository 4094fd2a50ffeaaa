"""Wukong on MovieLens, rating >= 4 against the rest, with the user's past as a pooled unit.

Under half a minute on two CPU cores, each set split by time.

  python launch/train.py --config=configs/wukong_movielens.py --workdir=runs/movielens \
    --config.data.path=RAW_OR_PREPARED
"""

from gemjax.config import Config, Data, Embedding, Optimizer, Train, Wukong


def get_config() -> Config:
  return Config(
    name="wukong_movielens",
    data=Data(path="movielens", batch_size=1024, history=50),
    embedding=Embedding(dim=16, learning_rate=0.01, small_rows=64, small_dim=4),
    model=Wukong(layers=2, fmb_units=8, lcb_units=8, rank=8, mlp=(128,), head=(128,)),
    optimizer=Optimizer(learning_rate=1e-3, warmup=0.1),
    train=Train(epochs=5, patience=1),
  )
