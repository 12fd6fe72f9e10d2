"""odelm: parameter-shared language models whose depth is integrated, and crossed in fewer steps."""

from pathlib import Path
from typing import TYPE_CHECKING

from odelm import models, ode
from odelm.config import (
    Config,
    DataConfig,
    InitConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    StepSamplingConfig,
    TrainConfig,
)
from odelm.errors import InputError
from odelm.models import CausalLM, Classifier, Encoder, MaskedLM, SharedBlock, create
from odelm.ode import integrate, integrate_adaptive
from odelm.version import __version__

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "CausalLM",
    "Classifier",
    "Config",
    "DataConfig",
    "Encoder",
    "InitConfig",
    "InputError",
    "MaskedLM",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SharedBlock",
    "StepSamplingConfig",
    "TrainConfig",
    "__version__",
    "create",
    "integrate",
    "integrate_adaptive",
    "load",
    "models",
    "ode",
]


def load(
    path: str | Path, *, step: int | None = None
) -> tuple[CausalLM | MaskedLM | Classifier | Encoder, Config, "Tokenizer | None"]:
    """Returns (model, config, tokenizer) of a run directory or a Hugging Face folder; see `odelm.pretrained.load`."""
    # Orbax takes longer to import than everything else together, and only loading needs it.
    from odelm import pretrained

    return pretrained.load(path, step=step)
