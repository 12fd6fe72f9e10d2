"""odelm: parameter-shared language models whose depth is integrated, and crossed in fewer steps."""

from typing import TYPE_CHECKING

from odelm.errors import InputError
from odelm.lazy import importer
from odelm.version import __version__

if TYPE_CHECKING:
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
        load_recipe,
    )
    from odelm.infer.draft_choice import with_fastest_drafts
    from odelm.infer.encoder_runner import EncoderRunner
    from odelm.infer.generator import Generator
    from odelm.infer.quantize import quantize
    from odelm.models import CausalLM, Classifier, Encoder, MaskedLM, SharedBlock, create
    from odelm.models.early_exit import EarlyExit
    from odelm.models.parameters import parameter_bytes
    from odelm.ode import integrate, integrate_adaptive
    from odelm.pretrained import load

__all__ = [
    "CausalLM",
    "Classifier",
    "Config",
    "DataConfig",
    "EarlyExit",
    "Encoder",
    "EncoderRunner",
    "Generator",
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
    "load_recipe",
    "models",
    "ode",
    "parameter_bytes",
    "quantize",
    "with_fastest_drafts",
]

_MODULES = {
    "odelm.config": (
        "Config DataConfig InitConfig MeshConfig ModelConfig OptimizerConfig StepSamplingConfig TrainConfig load_recipe"
    ),
    "odelm.infer.draft_choice": "with_fastest_drafts",
    "odelm.infer.encoder_runner": "EncoderRunner",
    "odelm.infer.generator": "Generator",
    "odelm.infer.quantize": "quantize",
    "odelm.models": "CausalLM Classifier Encoder MaskedLM SharedBlock create models",
    "odelm.models.early_exit": "EarlyExit",
    "odelm.models.parameters": "parameter_bytes",
    "odelm.ode": "integrate integrate_adaptive ode",
    "odelm.pretrained": "load",
}

__getattr__ = importer(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
