"""The next movie on ML-1M: HSTU over a user's last 200 events, all 3,706 movies ranked.

HR@10 .2980, NDCG@10 .1741, HR@50 .5593, MRR .1510 on each user's last item: one run, seed 0, 29
minutes on two CPU cores shared with others (an epoch took 24 s at best). Published by
generative-recommenders: SASRec .2853 / .1603, HSTU .3097 / .1720, of their own 101 epochs. Where a
user's last events have equal times, our file may order them otherwise than theirs. The kind of
score and the learning rate were chosen on the item before the last (--config.split=valid) in runs
of 2 to 12 epochs; 30 epochs are what time allowed.

  python launch/next_item.py --config=configs/next_item_movielens.py --workdir=runs/next_item \
    --config.path=FOLDER_OF_ML_1M
"""

from gemjax.config import Attention, Optimizer
from gemjax.config.next_item import NextItem, Tower


def get_config() -> NextItem:
  return NextItem(
    name="next_item_movielens",
    batch_size=32,
    epochs=30,
    eval_every=5,
    tower=Tower(attention=Attention(heads=1, position_buckets=9), negatives=512),
    optimizer=Optimizer(learning_rate=3e-3, warmup=0.02, schedule="cosine"),
  )
