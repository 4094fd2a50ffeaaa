"""A batch with two histories, and what holds of every model that reads them.

`Case` compares a model with an oracle that sees one example at a time, then changes what an
example's logits must not depend on.
"""

import functools

import jax
import numpy as np
from flax import nnx

from gemjax.layers.events import EventRows, HistorySpec
from gemjax.parallel import placement

B, N, D, T = 6, 5, 8, 2
# Not in the order of their names, in which JAX passes dicts.
SPECS = (
  HistorySpec("views", units=2, length=9, candidate=(3, -1)),
  HistorySpec("buys", units=1, length=5, candidate=(1,), ages=False),
)
LENGTHS = {"views": (3, 0, 9, 1, 5, 0), "buys": (2, 0, 4, 0, 5, 1)}
SLOTS = {"views": 24, "buys": 16}


# Compilation is nearly all of the time, and fusions are not what is tested.
FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  "xla_cpu_use_fusion_emitters": False,
}


def make_histories(seed=0):
  """Name -> (units_EFD, age_E); in the room behind the events lies what no event has."""
  rng, out = np.random.default_rng(seed), {}
  for spec in SPECS:
    slots = SLOTS[spec.name]
    age_E = np.exp(rng.uniform(0, np.log(3e7), slots)).astype(np.int32)
    start = 0
    for length in LENGTHS[spec.name]:
      age_E[start : start + length] = -np.sort(-age_E[start : start + length])
      start += length
    units_EFD = rng.normal(size=(slots, spec.units, D)).astype(np.float32)
    units_EFD[start:] *= 100
    out[spec.name] = units_EFD, age_E
  return out


def ends(name):
  return np.cumsum((0, *LENGTHS[name]))


def maker(kind, config, histories, **more):
  """How to make a model that reads the first `histories` of SPECS."""
  return lambda: kind(
    config,
    units=N,
    dim=D,
    tasks=T,
    histories=SPECS[:histories],
    dtype="float32",
    rngs=nnx.Rngs(0),
    **more,
  )


class Case:
  """A model with parameters at random, so that none hides at 0 or 1.

  Args:
    make: Of a model that reads (x_BND, histories, None, **more).
    oracle: (w, x, histories of (units, age), **more of one example) -> logits of one example.
    histories: How many of SPECS it reads.
    more: Further inputs (B, ...) by name.
  """

  def __init__(self, make, oracle, *, histories=2, **more):
    self.graph, state = nnx.split(nnx.eval_shape(make))
    placement.param_specs(state, {"data": 1, "model": 1})  # Raises unless all name their axes.
    rng = np.random.default_rng(7)

    def draw(p):
      kernel = len(p.shape) > 1
      mean, deviation = (0, p.shape[-2] ** -0.5) if kernel else (0.5, 0.3)
      return rng.normal(mean, deviation, p.shape).astype(np.float32)

    self.params = jax.tree.map(draw, nnx.to_pure_dict(state))
    self.specs, self.one, self.more = SPECS[:histories], oracle, more
    self.x_BND = rng.normal(size=(B, N, D)).astype(np.float32)
    self.histories = {s.name: make_histories()[s.name] for s in self.specs}

    def logits_of(params, x_BND, units, ages, lengths, more):
      rows = {name: EventRows(units[name], ages[name], lengths[name]) for name in units}
      return nnx.merge(self.graph, params)(x_BND, rows, None, **more)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(weight_BT, params, x_BND, units, *rest):
      logits_BT, pull = jax.vjp(lambda *args: logits_of(*args, *rest), params, x_BND, units)
      return logits_BT, pull(weight_BT)

    self._run = run
    self._forward = jax.jit(logits_of, compiler_options=FAST)

  def _args(self, x_BND=None, histories=None, lengths=LENGTHS, more=None):
    histories = self.histories if histories is None else histories
    units = {name: units_EFD for name, (units_EFD, _) in histories.items()}
    ages = {name: age_E for name, (_, age_E) in histories.items()}
    lengths = {name: np.array(lengths[name], np.int32) for name in histories}
    x_BND = self.x_BND if x_BND is None else x_BND
    return self.params, x_BND, units, ages, lengths, self.more if more is None else more

  def logits(self, **changed):
    return np.asarray(self._run(np.ones((B, T), np.float32), *self._args(**changed))[0])

  def gradients(self, weight_BT, **changed):
    """Of sum(weight * logits) by (parameters, x_BND, units of events)."""
    return jax.tree.map(np.asarray, self._run(weight_BT, *self._args(**changed))[1])

  def oracle(self, params, x_BND, units):
    logits = []
    for b in range(B):
      mine = []
      for spec in self.specs:
        start, end = ends(spec.name)[b : b + 2]
        mine.append((units[spec.name][start:end], self.histories[spec.name][1][start:end]))
      more = {name: x[b] for name, x in self.more.items()}
      logits.append(self.one(params, x_BND[b], mine, **more))
    return np.array(logits)

  def check_forward(self, tolerance=1e-4):
    """Values alone, of a program that is compiled in a third of the time."""
    wanted = self.oracle(*self._inputs64())
    np.testing.assert_allclose(self._forward(*self._args()), wanted, rtol=tolerance, atol=tolerance)

  def check_values(self, tolerance=1e-4):
    wanted = self.oracle(*self._inputs64())
    np.testing.assert_allclose(self.logits(), wanted, rtol=tolerance, atol=tolerance)

  def check_gradients(self, dead=(), step=1e-6, tolerance=3e-4):
    """Against the oracle's differences along directions in which everything moves.

    Of what is not `dead` each array has a gradient.
    """
    rng = np.random.default_rng(3)
    weight_BT = rng.normal(size=(B, T)).astype(np.float32)
    grads = self.gradients(weight_BT)
    still = {
      jax.tree_util.keystr(path)
      for path, g in jax.tree_util.tree_leaves_with_path(grads)
      if not np.abs(g).max() > 1e-6
    }
    assert still == set(dead)
    leaves, tree = jax.tree.flatten(self._inputs64())
    for _ in range(3):
      ways = [rng.normal(size=x.shape) for x in leaves]
      moved = lambda by, ways=ways: jax.tree.unflatten(
        tree, [x + by * way for x, way in zip(leaves, ways)]
      )
      loss = lambda by, moved=moved: (self.oracle(*moved(by)) * weight_BT).sum()
      wanted = (loss(step) - loss(-step)) / (2 * step)
      parts = [(g * way).sum() for g, way in zip(jax.tree.leaves(grads), ways)]
      assert abs(sum(parts) - wanted) < tolerance * np.linalg.norm(parts)

  def check_alone(self):
    """All of an example changes: no bit of another's logits does. Nor has it a gradient there.

    What lies in the room behind the events changes nothing.
    """
    before, other = self.logits(), make_histories(seed=1)
    for mine in range(B + 1):
      own = np.arange(B) == mine
      histories, slots = {}, {}
      for name, (units_EFD, age_E) in self.histories.items():
        first, end = (*ends(name), len(age_E))[mine : mine + 2]
        slots[name] = np.arange(len(age_E))
        slots[name] = (first <= slots[name]) & (slots[name] < end)
        units_EFD = np.where(slots[name][:, None, None], 9 * other[name][0], units_EFD)
        histories[name] = units_EFD, np.where(slots[name], 2**31 - 1, age_E)
      x_BND = np.where(own[:, None, None], self.x_BND[::-1], self.x_BND)
      more = {name: np.where(own, x[::-1], x) for name, x in self.more.items()}
      after = self.logits(x_BND=x_BND, histories=histories, more=more)
      np.testing.assert_array_equal(own, (before != after).any(1))
      if mine < B:
        _, of_x, of_units = self.gradients(np.tile(own[:, None], T).astype(np.float32))
        np.testing.assert_array_equal(own, of_x.any((1, 2)))
        for name, grad in of_units.items():
          np.testing.assert_array_equal(slots[name], grad.any((1, 2)))

  def check_order(self):
    """Examples in another order have the same logits."""
    order, histories, lengths = [4, 1, 0, 2, 5, 3], {}, {}
    for name, (units_EFD, age_E) in self.histories.items():
      slots = np.split(np.arange(len(age_E)), ends(name)[1:])
      place_E = np.concatenate([slots[b] for b in (*order, B)])
      histories[name] = units_EFD[place_E], age_E[place_E]
      lengths[name] = [LENGTHS[name][b] for b in order]
    more = {name: x[order] for name, x in self.more.items()}
    after = self.logits(x_BND=self.x_BND[order], histories=histories, lengths=lengths, more=more)
    np.testing.assert_allclose(after, self.logits()[order], rtol=1e-5, atol=1e-5)

  def check_none(self):
    """A batch without any event: logits and gradients are finite, none of an event."""
    none = dict.fromkeys(self.histories, (0,) * B)
    *dense, of_units = self.gradients(np.ones((B, T), np.float32), lengths=none)
    assert np.isfinite(self.logits(lengths=none)).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(dense))
    assert not any(g.any() for g in of_units.values())

  def check_all(self, dead=()):
    self.check_values()
    self.check_gradients(dead)
    self.check_alone()
    self.check_order()
    self.check_none()

  def _inputs64(self):
    units = {name: units_EFD for name, (units_EFD, _) in self.histories.items()}
    return jax.tree.map(lambda x: np.asarray(x, np.float64), (self.params, self.x_BND, units))
