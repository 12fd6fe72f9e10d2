"""Which models the kernels take."""

from odelm.models.kernels.layout import ROWS, THREADS, WIDEST
from odelm.models.transformer import DepthPlan, SharedTransformer


def block_bits(model: SharedTransformer) -> int:
    """Returns the bits of the matrices of a model's blocks, as of `layout.Layout`."""
    return 16 if model.quantization is None else 8


def unsupported(model: SharedTransformer, plan: DepthPlan) -> str | None:
    """Returns why no kernel takes a model along a plan, in a few words; None if one does."""
    config = model.config
    attended, hidden = config.heads * config.head_size, config.feedforward_size
    widest = WIDEST[block_bits(model)]
    reasons = {
        "it is no decoder": config.kind != "decoder",
        f"it is quantised as {model.quantization}": model.quantization not in (None, "int8"),
        "it is post-norm": config.norm_placement != "pre",
        "its state has lanes": config.lanes > 1,
        "its groups have inner blocks": config.inner_blocks > 1,
        "its layers have corrections of their own": config.layer_rank > 0,
        "its embedding is factorised": config.embed_dim is not None or config.embed_norm,
        "it shares keys and values along depth": config.kv_span > 1,
        "its tokens have types": bool(config.token_types),
        f"its heads are of {config.head_size}, not {ROWS}": config.head_size != ROWS,
        f"its width is {config.width}, no multiple of {THREADS}": config.width % THREADS != 0,
        f"its width is {config.width}, above {widest}": config.width > widest,
        f"its heads have {attended} numbers, no multiple of {THREADS}": attended % THREADS != 0,
        f"its hidden units are {hidden}, no multiple of {ROWS}": hidden % ROWS != 0,
        "the solver takes several stages": any(part.times.shape[1] > 1 for part in plan),
        "the integrator is Diffrax's": any(part.solver is not None for part in plan),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
