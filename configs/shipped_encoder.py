"""The encoder that comes with odelm as `small-encoder`: 12 x 384, a block of its own at either end, 9.1 M parameters.

    python train.py --config=configs/shipped_encoder.py --workdir=runs/shipped_encoder --config.data.source=PATH
    python infer.py --workdir=runs/shipped_encoder --export=bundles/small-encoder --storage=int8 --steps=

The text is that of `configs/shipped_decoder.py`. On one H200 the 6,300 updates (413 M tokens) took 2 min 36 s, a fifth
of it waiting for masks, and with compiling and evaluating 3 min 42 s. Held-out loss, nats per masked token, at 10, 4,
2 and 1 steps of the core, which are 12, 6, 4 and 3 evaluations in all:

    update 2,100    2.752  2.733  2.759  2.786
    update 4,200    2.422  2.425  2.441  2.511
    update 6,300    2.087  2.094  2.117  2.191
"""

import dataclasses

from odelm.config import Config, load_recipe


def get_config() -> Config:
    base = load_recipe("shipped_decoder")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, kind="encoder", token_types=2, max_length=256),
        train=dataclasses.replace(base.train, updates=6300, batch_size=256, length=256, checkpoint_every=3000),
    )
