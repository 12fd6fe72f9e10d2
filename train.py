"""Launches pre-training: flags in, `odelm.train` out.

    python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.FIELD=VALUE ...]
    python train.py --workdir=runs/tiny

The first starts a run, or resumes it if it was interrupted; the second resumes one by its own `config.json`. Every
option of a recipe can be overridden by its path, such as `--config.train.updates=1000` or
`--config.data.corpus=text --config.data.source=my_texts`.
"""

import os
import sys

from absl import flags

from odelm import cli
from odelm.config import Config
from odelm.errors import InputError

CONFIG = flags.DEFINE_string("config", None, "The recipe, such as configs/tiny.py; without it, that of the workdir.")
OVERRIDES = flags.DEFINE_multi_string(cli.OVERRIDE, [], "An option as PATH=VALUE, the same as --config.PATH=VALUE.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, required=True, help="Directory of the run: metrics, checkpoints, tokenizer."
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a multi-host job first.")
flags.register_validator("workdir", lambda value: value != "", message="is empty, expected a directory")


def main() -> None:
    from odelm.train.run import train

    workdir = os.path.expanduser(WORKDIR.value)
    config = cli.overridden(_config(workdir), OVERRIDES.value)
    if DISTRIBUTED.value:
        import jax

        jax.distributed.initialize()
    train(config, workdir)


def _config(workdir: str) -> Config:
    """Returns the recipe that is asked for, or that of the run in the workdir."""
    from odelm.run_directory import CONFIG as SAVED
    from odelm.run_directory import read_config

    if CONFIG.value is not None:
        return cli.read_recipe(CONFIG.value)
    if not os.path.exists(os.path.join(workdir, SAVED)):
        raise InputError(
            f"{workdir} holds no run to resume, and there is no --config: give a recipe, such as "
            "--config=configs/tiny.py, to start one"
        )
    return read_config(workdir)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv, usage=__doc__ or ""))
