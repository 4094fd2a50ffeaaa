"""Programs of several shapes: who waits for one is told so."""

import jax.numpy as jnp

from gemjax.train import compiled
from gemjax.train.compiled import Compiled
from gemjax.train.executables import Executables


def test_a_later_program_that_took_long_is_told_of_once(monkeypatch):
  monkeypatch.setattr(compiled, "_NOTICED", 0.0)
  told = []
  program = Compiled("step", lambda a, x: a + x.sum(), Executables(say=told.append), varying=(1,))
  for size in (3, 3, 5, 3, 5):
    assert program(jnp.ones(()), jnp.ones(size)) == 1 + size
  assert program.compilations == 2
  (line,) = told
  assert line.startswith("batches of other sizes: program 2 of step was ready after")


def test_one_that_did_not_is_not(monkeypatch):
  monkeypatch.setattr(compiled, "_NOTICED", 1e9)
  told = []
  program = Compiled("step", lambda x: x.sum(), Executables(say=told.append), varying=(0,))
  for size in (3, 5):
    program(jnp.ones(size))
  assert not told
