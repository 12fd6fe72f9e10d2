"""Which cases `make test` runs: a few of most features. `make test-all` runs the others too."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def thorough(*values: Any) -> Any:
    """Returns one case, for `pytest.mark.parametrize`, that `make test` leaves to `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def few(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Returns the cases, for `pytest.mark.parametrize`: of a tuple each value is an argument; `chosen` run each time.

    A case is chosen as it is or, in a mapping from names to cases, by its name, which becomes its id.
    """
    named = cases.items() if isinstance(cases, Mapping) else [(case, case) for case in cases]
    named = list(named)
    unknown = [name for name in chosen if name not in [known for known, _ in named]]
    assert not unknown, f"no such cases: {unknown}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=name if isinstance(cases, Mapping) else None,
            marks=[] if name in chosen else pytest.mark.thorough,
        )
        for name, case in named
    ]
