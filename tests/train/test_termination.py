"""SIGTERM: no handler of errors takes it for one."""

import contextlib
import signal

import pytest

from gemjax.train.termination import Terminated, Termination


def test_code_that_survives_any_error_does_not_survive_it():
  sentence = "half done; the same command begins anew"
  survive = contextlib.suppress(Exception)  # As libraries go on without what fails to load.
  with pytest.raises(Terminated, match=sentence), Termination("half done"), survive:
    signal.raise_signal(signal.SIGTERM)


def test_deferred_it_is_only_noted():
  with Termination() as termination:
    termination.deferred = True
    signal.raise_signal(signal.SIGTERM)
    assert termination.requested
