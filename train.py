"""Launches pre-training: flags in, `odelm.train` out.

    python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.FIELD=VALUE ...]

The same command resumes an interrupted run. Every option of a recipe can be overridden by its path, such as
`--config.train.updates=1000` or `--config.data.corpus=text --config.data.source=my_texts`.
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

from odelm import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, such as configs/tiny.py.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, required=True, help="Directory of the run: metrics, checkpoints, tokenizer."
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a multi-host job first.")
flags.mark_flag_as_required("config")
flags.register_validator("workdir", lambda value: value != "", message="is empty, expected a directory")


def main() -> None:
    from odelm.train import loop

    if DISTRIBUTED.value:
        import jax

        jax.distributed.initialize()
    loop.train(CONFIG.value, os.path.expanduser(WORKDIR.value))


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv, usage=__doc__ or ""))
