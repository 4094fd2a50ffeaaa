"""The loss of which event comes next, against its formula in float64, whole and in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gemjax.layers import next_event
from gemjax.layers.next_event import NextEvent, NextEvents, next_event_loss, others
from gemjax.layers.tokens import of_lengths
from gemjax.parallel.mesh import make_mesh

B, D, AXES = 16, 4, ("data", "model")
LENGTHS = np.array([3, 0, 1, 2, 0, 0, 5, 1, 4, 2, 2, 0, 1, 1, 6, 2], np.int32)


@pytest.fixture
def few(monkeypatch):
  monkeypatch.setattr(next_event, "OTHERS", 5)


def events():
  rng = np.random.default_rng(0)
  draw = lambda: [rng.normal(size=(n, D)) for n in LENGTHS]
  return draw(), draw()


def parts(asks, items, shards):
  """`NextEvents` as `shards` devices have them, each with room for the same number of events."""
  room = max(sum(map(len, asks[s : s + B // shards])) for s in range(0, B, B // shards)) + 9
  out = []
  for s in range(0, B, B // shards):
    mine = slice(s, s + B // shards)
    lengths = LENGTHS[mine]
    behind = np.full((room - lengths.sum(), D), 1e3)
    pad = lambda xs, behind=behind: np.concatenate([*xs, behind])
    followed = np.concatenate([np.arange(n) < n - 1 for n in lengths])
    newest = [x[-1] if len(x) else np.zeros(D) for x in items[mine]]
    of = NextEvents(
      pad(asks[mine]), pad(items[mine]), np.pad(followed, (0, room - len(followed))),
      np.array(newest), lengths > 0,
    )  # fmt: skip
    out.append(jax.tree.map(lambda x: x.astype(bool if x.dtype == bool else np.float32), of))
  return jax.tree.map(lambda *x: np.concatenate(x), *out)


def oracle(asks, items, count):
  known = [x[-1] for x in items[:count] if len(x)]
  losses = []
  for a, i in zip(asks, items):
    for e in range(len(a) - 1):
      scores = np.array([a[e] @ i[e + 1], *(a[e] @ k for k in known)])
      losses.append(np.log(np.exp(scores).sum()) - scores[0])
  return np.mean(losses)


@pytest.mark.parametrize("shards", [1, 8])
def test_parts_add_up_to_the_formula(few, shards):
  """With eight devices the five examples whose events are the others lie on three."""
  asks, items = events()
  mesh = make_mesh(1, shards, jax.devices()[:shards])

  def loss(of):
    total = jax.lax.psum(of.followed_E.sum(), AXES)
    return jax.lax.psum(next_event_loss(of, *others(of, AXES), total), AXES)

  whole = jax.shard_map(loss, mesh=mesh, in_specs=P(AXES), out_specs=P(), check_vma=False)
  got = jax.jit(whole)(parts(asks, items, shards))
  np.testing.assert_allclose(got, oracle(asks, items, 5), rtol=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_gradients_are_finite_where_there_is_nothing_to_learn(known):
  """No other event, or no event with a next one."""
  asks, items = events()
  of = parts(asks, items, 1)
  of = of._replace(any_B=of.any_B & known, followed_E=of.followed_E & (not known))
  loss = lambda a, i: next_event_loss(
    of._replace(asks_ED=a, item_ED=i), of.newest_BD, of.any_B, jnp.sum(of.followed_E)
  )
  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(of.asks_ED, of.item_ED)
  assert value == 0 and all((np.asarray(g) == 0).all() for g in grads)


def test_room_and_lengths_say_what_is_followed():
  """A layer's own `followed_E` and `newest_BD`, empty histories among them, are those above."""
  asks, items = events()
  wanted = parts(asks, items, 1)
  E = len(wanted.item_ED)
  tokens = of_lengths(jnp.ones((E, D)), jnp.asarray(LENGTHS), jnp.zeros(E, jnp.int32))
  layer = NextEvent(D, dtype="float32", rngs=nnx.Rngs(0))
  found = jax.jit(functools.partial(NextEvent.__call__, layer))(tokens, wanted.item_ED)
  for name in ("item_ED", "followed_E", "newest_BD", "any_B"):
    np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
