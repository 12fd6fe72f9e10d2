"""Which ways to continue a text go together."""

from odelm.arguments import whole
from odelm.errors import InputError
from odelm.infer.drafts import Drafting
from odelm.models.early_exit import EarlyExit, check_exits
from odelm.models.memory import check_memory
from odelm.models.transformer import DepthPlan, SharedTransformer


def check_together(
    model: SharedTransformer,
    plan: DepthPlan,
    *,
    prefill_plan: DepthPlan | None,
    drafting: Drafting | None,
    early_exit: EarlyExit | None,
    window: int | None,
) -> None:
    """Raises InputError for what an `odelm.Generator` cannot do at once, and for what the model cannot take."""
    if early_exit is not None:
        check_exits(model, plan, early_exit)
        if prefill_plan is not None or drafting is not None:
            raise InputError("early exits go with one grid and no drafts: leave out prefill_steps and the draft")
    if prefill_plan is not None and drafting is not None:
        raise InputError("a prompt crosses the depth as drafts are verified: leave out prefill_steps, or the draft")
    limit = model.config.max_length
    if drafting is not None and drafting.length >= limit:
        raise InputError(f"draft_length is {drafting.length}, expected less than model.max_length, {limit}")
    if window is not None:
        if drafting is not None or early_exit is not None:
            raise InputError("a window does not go with drafts or early exits: leave out one of them")
        check_memory(model.config, 1, whole("window", window))
