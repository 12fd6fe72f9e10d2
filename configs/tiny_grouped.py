"""The demo's decoder partially shared: three blocks, each applied over a third of the depth.

    python train.py --config=configs/tiny_grouped.py --workdir=runs/tiny_grouped

Every step count is a multiple of the groups. It has not been run to the end.
"""

import dataclasses

from configs import tiny
from odelm.config import Config


def get_config() -> Config:
    base = tiny.get_config()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, groups=3),
        step_sampling=dataclasses.replace(base.step_sampling, counts=(3, 6, 12)),
    )
