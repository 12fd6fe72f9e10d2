"""Where one of several processes fails, all do; the others are what `process_allgather` is made to tell of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from odelm import processes
from odelm.checkpoint import Checkpoints
from odelm.errors import EVERYWHERE, InputError, RunFailure


@pytest.fixture
def others(monkeypatch) -> list[bool]:
    """Returns whether each of two other processes fails, which a test may change."""
    failing = [False, False]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.array([own, *failing]))
    return failing


def test_an_error_of_this_process_is_told_the_others(others, monkeypatch):
    told = []
    gather = multihost_utils.process_allgather
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: told.append(bool(own)) or gather(own))
    with pytest.raises(InputError, match="wrong") as caught, processes.together("reading"):
        raise InputError("wrong")
    assert told == [True] and caught.value.__notes__ == [EVERYWHERE]
    with processes.together("reading"):
        pass
    assert told == [True, False]


def test_an_error_of_another_process_is_ours_too(others):
    others[1] = True
    with pytest.raises(RunFailure, match="process 2 failed while reading: see what it says") as caught:
        with processes.together("reading"):
            pass
    assert caught.value.__notes__ == [EVERYWHERE]


def test_a_process_alone_tells_nobody(monkeypatch):
    monkeypatch.delattr(multihost_utils, "process_allgather")
    with processes.together("reading"):
        pass
    with pytest.raises(KeyError), processes.together("reading"):
        raise KeyError


def test_a_save_that_fails_elsewhere_fails_here(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    monkeypatch.setattr(processes, "failures", lambda *, failed: [1])
    with pytest.raises(RunFailure, match="process 1 failed while saving"):
        checkpoints.save(2, {"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    monkeypatch.undo()
    checkpoints.close()
    assert checkpoints.steps() == [1]
