"""What runs and comparisons compute, traced once a process for tests of what surrounds it: loops, files, command lines.

An update, an initialisation, a loss and a forward pass are pure functions of a config or of a model's structure, and
tracing and compiling them takes most of the time of a run of a few updates.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from odelm.config import Config, replace
from odelm.evals import sweep
from odelm.train import evaluate, run, step

# What an update does not depend on, and the tests change.
ELSEWHERE = {
    "data.source": "", "data.valid_source": "", "data.data_dir": "", "data.tokenizer": "", "train.eval_every": 1,
    "train.eval_batches": 1, "train.eval_steps": (), "train.checkpoint_every": 1, "train.keep": 1,
    "train.keep_every": 0, "train.log_every": 1, "train.watch": False, "train.max_nonfinite": 1,
}  # fmt: skip


def by_config(make: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `make(config, ...)` that gives configs which differ only elsewhere, and equal arguments, one function.

    It is made for none of their values elsewhere, so that one which comes to matter is seen to be ignored.
    """
    made: dict[Any, Any] = {}

    @functools.wraps(make)
    def remembered(config: Config, *arguments: Any) -> Any:
        config = replace(config, ELSEWHERE)
        key = repr(config), *arguments
        if key not in made:
            made[key] = make(config, *arguments)
        return made[key]

    return remembered


KEPT = [
    # Optimizers are functions, and equal only where they are the same.
    (run, "make_optimizer", functools.cache(run.make_optimizer)),
    (run, "make_update", by_config(run.make_update)),
    (step, "_init", by_config(step._init)),
    (evaluate, "make_loss", functools.cache(evaluate.make_loss)),
    (sweep, "make_forward", functools.cache(sweep.make_forward)),
    (sweep, "make_adaptive", functools.cache(sweep.make_adaptive)),
]


@contextmanager
def traced_once(once: bool = True) -> Iterator[None]:
    """Shares what is traced while the block runs, or no longer does."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, function in KEPT:
            patch.setattr(module, name, function if once else function.__wrapped__)
        yield
