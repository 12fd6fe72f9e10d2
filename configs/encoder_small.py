"""A small ALBERT, exactly: 12 x 512, trained with unit steps only, as existing models are; docs/adopt.md adapts it.

    python train.py --config=configs/encoder_small.py --workdir=runs/encoder_small \\
        --config.data.corpus=text --config.data.source=PATH

On one H100 its 15,000 updates (246 M tokens) take about six minutes, and reached a held-out loss of 5.05 and 5.07
nats/token at 12 steps in two runs, and of 8 to 32 at 6, 4 and 3 (docs/adopt.md).
"""

import dataclasses

from odelm.config import Config, OptimizerConfig, StepSamplingConfig, load_recipe


def get_config() -> Config:
    base = load_recipe("encoder_base")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, vocab_size=16_384, width=512, heads=8, sentence_order=False, time_modulation=False
        ),
        step_sampling=StepSamplingConfig(kind="fixed"),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, warmup=1000, decay="linear", final_fraction=0.0, weight_decay=0.01
        ),
        train=dataclasses.replace(base.train, updates=15_000, batch_size=128, length=128, eval_batches=64),
    )
