"""A small ALBERT, exactly: 12 x 512, trained with unit steps only, as existing models are; docs/adopt.md adapts it.

    python train.py --config=configs/encoder_small.py --workdir=runs/encoder_small \\
        --config.data.corpus=text --config.data.source=PATH

On one H100 its 15,000 updates (246 M tokens) take about six minutes, and reach a held-out loss of 5.02 nats/token at
12 steps, 9.0 at 6 and 9.1 at 3. It leaves the plateau of token frequencies and their neighbours at about update 9,000.
At a learning rate of 1e-3 one of two runs collapsed to the token frequencies (7.27) at update 2,620, for good; the
other reached 5.15, with an earlier order of documents. At 3e-4 it reached 5.50.
"""

import dataclasses

from odelm.config import Config, StepSamplingConfig, load_recipe


def get_config() -> Config:
    base = load_recipe("encoder_base")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, vocab_size=16_384, width=512, heads=8, sentence_order=False, time_modulation=False
        ),
        step_sampling=StepSamplingConfig(kind="fixed"),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=5e-4),
        train=dataclasses.replace(base.train, updates=15_000, batch_size=128, length=128, eval_batches=64),
    )
