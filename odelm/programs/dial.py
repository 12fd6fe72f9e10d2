"""What `infer.py` does with a limit on the loss: --max_loss_increase."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl.flags import FlagValues

from odelm.errors import InputError

if TYPE_CHECKING:
    from odelm.evals.compare import Comparison

SEARCHED = (
    "steps", "solver", "integrator", "adaptive_tolerance", "prompt", "prompt_file", "generate", "baseline", "export",
    "quantize", "early_exit", "kv_span",
)  # fmt: skip
"""Flags that --max_loss_increase takes the place of."""
CROSSED_OTHERWISE = (
    "steps", "max_loss_increase", "quantize", "early_exit", "kv_span", "solver", "integrator", "speculative",
    "generate",
)  # fmt: skip
"""Flags that --profile_file does not go with: they say how the depth is crossed, or compare steps of their own."""


def max_loss_increase(flags: FlagValues) -> float | None:
    """Returns --max_loss_increase as a share; InputError for what is none, and for flags that do not go with it."""
    text = flags.max_loss_increase
    if text is None:
        return None
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        limit = float(number) / (100 if percent else 1)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1:
        raise InputError(
            f"--max_loss_increase is {text!r}, expected a share of the loss from 0 to below 1, such as 0.5% or 0.005"
        )
    others = {name: flags[name].value not in (None, flags[name].default) for name in SEARCHED}
    if flags.eval_batches == 0 or any(others.values()):
        name = next((name for name, given in others.items() if given), "eval_batches=0")
        raise InputError(f"--max_loss_increase searches steps and solver on held-out text: leave out --{name}")
    return limit


def check_profile_file(flags: FlagValues) -> None:
    """Raises InputError for --profile_file together with one of `CROSSED_OTHERWISE`."""
    if flags.profile_file is None or flags.export is not None:
        return
    for name in CROSSED_OTHERWISE:
        if flags[name].value != flags[name].default:
            raise InputError(f"--profile_file and --{name} were given, which do not go together: leave out one of them")


def find_profile(
    loaded: Any, limit: float, options: "Comparison", *, source: Path, step: int | None, out: Path | None
) -> None:
    """Searches the cheapest steps that keep the limit, and writes them."""
    from odelm.evals.dial import find_profile

    print(f"written to {find_profile(loaded, limit, options, source=source, step=step, out=out)}")
