"""HSTU of generative-recommenders: its queries and scores here, and its bits on the way back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from gemjax.checkpoint import Checkpoints
from gemjax.config import Attention, Optimizer
from gemjax.config.next_item import NextItem, Tower
from gemjax.convert import ConvertError, convert
from gemjax.data.next_item import Sequences, read_events
from gemjax.train.next_item import Trainer, train_next_item
from gemjax.train.workdir import CHECKPOINTS

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[convert]'")
import public_hstu  # noqa: E402

ITEMS, LENGTH, PLACES, USERS = 40, 12, 17, 30
NEVER = {7, 8, 23}  # Items that nobody came to.


def config_of(folder, **tower) -> NextItem:
  """Also a config file: --config=test_generative_recommenders.py, --config.path=.."""
  return NextItem(
    name="peer",
    path=str(folder),
    length=LENGTH,
    own_ids=True,
    batch_size=8,
    epochs=2,
    eval_every=1,
    tower=Tower(
      cell="public_hstu", score="cosine", layers=2, dim=8, places=PLACES,
      attention=Attention(heads=2), dropout=0.1, negatives=9, **tower,
    ),
    optimizer=Optimizer(learning_rate=1e-2),
  )  # fmt: skip


@pytest.fixture(scope="module")
def histories():
  """(item, time) of every user: seconds to years apart, some longer than what is read."""
  rng = np.random.default_rng(0)
  known = [item for item in range(1, ITEMS + 1) if item not in NEVER]
  found = []
  for _ in range(USERS):
    count = int(rng.integers(3, LENGTH + 6))
    gaps = np.exp(rng.uniform(0, 18, count)).astype(int)
    found.append(list(zip(rng.choice(known, count).tolist(), (10**9 + gaps.cumsum()).tolist())))
  found[0][0] = (ITEMS, found[0][0][1])  # So that the greatest id is known.
  return found


@pytest.fixture(scope="module")
def folder(histories, tmp_path_factory):
  path = tmp_path_factory.mktemp("raw")
  lines = [f"{u}::{i}::3::{t}" for u, events in enumerate(histories) for i, t in events]
  (path / "ratings.dat").write_text("\n".join(lines) + "\n")
  return path


@pytest.fixture(scope="module")
def model():
  """Weights so large that every part of it decides."""
  torch.manual_seed(1)
  model = public_hstu.Hstu(items=ITEMS, dim=8, layers=2, heads=2, places=PLACES)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0, 0.5)
  return model.eval()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
  """As its trainer saves it, from inside DistributedDataParallel."""
  path = tmp_path_factory.mktemp("file") / "ml-1m_ep100"
  optimizer = torch.optim.AdamW(model.parameters())
  wrapped = {f"module.{name}": x for name, x in model.state_dict().items()}
  state = optimizer.state_dict()
  torch.save({"epoch": 100, "model_state_dict": wrapped, "optimizer_state_dict": state}, path)
  return path


def theirs(model, histories):
  """(queries, cosines) of every user's events but the last, the newest LENGTH of them."""
  ids, times = torch.zeros((2, len(histories), PLACES), dtype=torch.int64)
  for b, events in enumerate(histories):
    for n, (item, _) in enumerate(events[:-1][-LENGTH:]):
      ids[b, n] = item
    for n, (_, time) in enumerate(events[-LENGTH - 1 :]):  # The time of what is asked as well.
      times[b, n] = time
  with torch.no_grad():
    queries = model(ids, times)
    return queries, model.cosines(queries)


def test_its_scores_here_and_its_bits_on_the_way_back(model, file, histories, folder, tmp_path):
  config, run, back = config_of(folder), tmp_path / "run", tmp_path / "back.pt"
  lines = convert(
    source="hstu", target="gemjax", input=file, output=run, config=config, verify=True
  )
  assert "equal to the bit" in lines[-1]
  events = read_events(folder, own_ids=True)
  trainer = Trainer(config, events.items, 1, events.known_V)
  with Checkpoints(run / CHECKPOINTS, read_only=True) as checkpoints:
    params = checkpoints.restore(jax.eval_shape(trainer.born)).state.params
  tower = nnx.merge(trainer.graph, params)
  asked = Sequences(events, LENGTH, 0, USERS)
  batch = asked.pack(np.arange(USERS))
  queries = trainer.queries(tower, batch)
  scores = tower.score(queries) * config.tower.temperature
  want_queries, want_cosines = theirs(model, histories)
  assert np.std(want_cosines.numpy()) > 0.1
  for b in range(USERS):
    first, stop = batch.offsets_B1[b : b + 2]
    for got, want in ((queries, want_queries), (scores, want_cosines)):
      np.testing.assert_allclose(got[first:stop], want[b, : stop - first], rtol=0, atol=1e-5)
  convert(source="gemjax", target="hstu", input=run, output=back, verify=True)
  found = torch.load(back, weights_only=True)
  assert found.keys() == model.state_dict().keys()
  for name, tensor in model.state_dict().items():
    assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_run_is_ranked_as_there_and_trained_on(
  model, file, histories, folder, tmp_path, capsys
):
  """Of all items that somebody came to, but those of the history, the next one has this rank."""
  config, run = config_of(folder), tmp_path / "run"
  convert(source="hstu", target="gemjax", input=file, output=run, config=config)
  _, cosines = theirs(model, histories)
  ranks = []
  for events, cosine_NV in zip(histories, cosines.numpy()):
    history, target = [item for item, _ in events[:-1]][-LENGTH:], events[-1][0]
    cosine_V = cosine_NV[len(history) - 1]
    others = set(range(1, ITEMS + 1)) - NEVER - set(history) - {target}
    ahead = len(others & set(np.flatnonzero(cosine_V >= cosine_V[target])))
    ranks.append(1 + (len(others) if target in history else ahead))
  summary = train_next_item(config, run)
  wanted = np.mean([rank <= 10 for rank in ranks])
  assert f"epoch   0/2  hr@10 {wanted:.4f}" in capsys.readouterr().out
  assert summary["train"]["steps"] == 2 * 4 and summary["test"]["items"] == ITEMS - len(NEVER)
  assert json.loads((run / "summary.json").read_text()) == summary


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"own_ids": False}, r"config.own_ids is False, but generative-recommenders has True"),
    ({"cell": "hstu"}, r"config.tower.cell is 'hstu', but generative-recommenders has 'public_hst"),
    ({"layers": 1}, r"ml-1m_ep100 has _hstu._attention_layers.1._uvqk.* of this config has not"),
    ({"places": 20}, r"has the _attn_mask of 17 places, but config.tower.places is 20"),
    ({"dim": 16}, r"out.bias is float32 8, but the config asks for the shape \(16,\)"),
  ],
)
def test_another_config_is_refused(file, folder, tmp_path, change, message):
  config = config_of(folder)
  for name, value in change.items():
    setattr(config if name == "own_ids" else config.tower, name, value)
  with pytest.raises(ConvertError, match=message):
    convert(source="hstu", target="gemjax", input=file, output=tmp_path / "run", config=config)
  assert not list(tmp_path.iterdir())


def test_other_data_and_other_formats_are_refused(file, folder, tmp_path):
  raw = tmp_path / "raw"
  raw.mkdir()
  (raw / "ratings.dat").write_text("1::5::3::7\n1::6::3::8\n1::9::3::9\n")
  for options, message in (
    ({"config": config_of(raw)}, r"has 41 rows for items, but those of .* ask for 10, one for"),
    ({"config": config_of(folder), "step": 3}, r"--checkpoint names a checkpoint of a run's"),
    ({"config": None}, r"--from=hstu needs --config, a NextItem that describes"),
    ({"config": config_of(folder), "target": "safetensors"}, r"hstu is converted to gemjax and"),
    ({"config": config_of(folder), "source": "fuxictr"}, r"a NextItem describes hstu alone"),
  ):
    options = {"source": "hstu", "target": "gemjax"} | options
    with pytest.raises(ConvertError, match=message):
      convert(input=file, output=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_places_and_attention_obey_laws(folder):
  from gemjax.fields import ConfigError

  config = config_of(folder)
  for change, message in (
    ({"places": 5}, r"tower.places is 5, but must be 0 or at least config.length, 12"),
    ({"attention": Attention(heads=2, rope=10.0)}, r"tower.attention is .* by default but for"),
    ({"temperature": 0.0}, r"tower.temperature is 0.0, but must be positive"),
  ):
    wrong = dataclasses.replace(config, tower=dataclasses.replace(config.tower, **change))
    with pytest.raises(ConfigError, match=message):
      wrong.validate()
