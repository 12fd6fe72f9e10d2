"""Every option of a recipe: typed, with its unit and its reason, validated, and written as JSON.

A recipe under `configs/` is a `get_config()` that returns a `Config`. `Config.validate` raises
`odelm.errors.InputError` naming the field, its value and the nearest valid choice.
"""

from odelm.config.data import CORPORA, MASK_UNITS, ON_BAD_RECORD, PACKINGS, SPLITS, DataConfig
from odelm.config.init import MERGES, OVERRIDABLE, InitConfig
from odelm.config.load import load_recipe, recipe_names
from odelm.config.model import ACTIVATIONS, ATTENTIONS, DTYPES, KINDS, NORM_PLACEMENTS, NORMS, POSITIONS, ModelConfig
from odelm.config.optimizer import DECAYS, OPTIMIZERS, OptimizerConfig
from odelm.config.parse import parse_value
from odelm.config.recipe import Config
from odelm.config.serialize import changed_options, check_option, from_dict, from_json, options, replace, to_json
from odelm.config.step_sampling import SAMPLINGS, StepSamplingConfig, annealed_steps, default_steps
from odelm.config.tasks import TASKS, Task
from odelm.config.training import REMAT_POLICIES, MeshConfig, TrainConfig

__all__ = [
    "ACTIVATIONS",
    "ATTENTIONS",
    "CORPORA",
    "Config",
    "DECAYS",
    "DTYPES",
    "DataConfig",
    "InitConfig",
    "KINDS",
    "MASK_UNITS",
    "MERGES",
    "MeshConfig",
    "ModelConfig",
    "NORMS",
    "NORM_PLACEMENTS",
    "ON_BAD_RECORD",
    "OPTIMIZERS",
    "OVERRIDABLE",
    "OptimizerConfig",
    "PACKINGS",
    "POSITIONS",
    "REMAT_POLICIES",
    "SAMPLINGS",
    "SPLITS",
    "StepSamplingConfig",
    "TASKS",
    "Task",
    "TrainConfig",
    "annealed_steps",
    "changed_options",
    "check_option",
    "default_steps",
    "from_dict",
    "from_json",
    "load_recipe",
    "options",
    "parse_value",
    "recipe_names",
    "replace",
    "to_json",
]
