"""Launches pre-training: flags in, `odelm.train` out.

    python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.FIELD=VALUE ...]

The same command resumes an interrupted run. Every option of a recipe can be overridden by its path, such as
`--config.train.updates=1000` or `--config.data.corpus=text --config.data.source=my_texts`.
"""

import sys

from absl import flags
from ml_collections import config_flags

from odelm import cli
from odelm.config import Config
from odelm.errors import InputError

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, such as configs/tiny.py.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, required=True, help="Directory of the run: metrics, checkpoints, tokenizer."
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a multi-host job first.")
flags.mark_flag_as_required("config")


def main() -> None:
    from odelm.train import loop

    if DISTRIBUTED.value:
        import jax

        jax.distributed.initialize()
    loop.train(_recipe(), WORKDIR.value)


def _recipe() -> Config:
    try:
        return CONFIG.value.validate()
    except OSError as error:
        raise InputError(f"the recipe cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv, usage=__doc__ or ""))
