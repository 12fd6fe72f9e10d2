"""A masked language model of ALBERT large's shape, 24 x 1024, on your own text.

    python train.py --config=configs/encoder_large.py --workdir=runs/encoder_large \\
        --config.data.corpus=text --config.data.source=PATH

It has not been run yet: the learning rates are those of `configs/encoder_base.py`.
"""

import dataclasses

from odelm.config import Config, load_recipe


def get_config() -> Config:
    base = load_recipe("encoder_base")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, width=1024, heads=16, depth=24),
    )
