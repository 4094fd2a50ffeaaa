"""The next movie on ML-1M: HSTU over the last 200, all 3,706 movies ranked.

  python launch/next_item.py --config=configs/next_item_movielens.py --workdir=runs/next_item \
    --config.path=FOLDER_OF_ML_1M
"""

from gemjax.config import Attention, Optimizer
from gemjax.config.next_item import NextItem, Tower


def get_config() -> NextItem:
  return NextItem(
    name="next_item_movielens",
    epochs=40,
    tower=Tower(attention=Attention(heads=1, position_buckets=32, time_buckets=32), negatives=512),
    optimizer=Optimizer(learning_rate=2e-3, warmup=0.05, schedule="cosine"),
  )
