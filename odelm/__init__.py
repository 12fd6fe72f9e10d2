"""odelm: parameter-shared language models whose depth is integrated, and crossed in fewer steps."""

from pathlib import Path
from typing import TYPE_CHECKING

from odelm import models, ode
from odelm.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig
from odelm.errors import InputError
from odelm.models import CausalLM, Classifier, MaskedLM, SharedBlock, create
from odelm.ode import integrate, integrate_adaptive
from odelm.version import __version__

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "CausalLM",
    "Classifier",
    "Config",
    "DataConfig",
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


def load(workdir: str | Path, *, step: int | None = None) -> tuple[CausalLM | MaskedLM, Config, "Tokenizer"]:
    """Returns (model, config, tokenizer) of a training directory; see `odelm.checkpoint.load`."""
    # Orbax takes longer to import than everything else together, and only loading needs it.
    from odelm import checkpoint

    return checkpoint.load(workdir, step=step)
