"""A decoder of GPT-2 small's shape, 12 x 768, one block shared by all depths, on your own text.

    python train.py --config=configs/decoder_small.py --workdir=runs/small \\
        --config.data.corpus=text --config.data.source=PATH

20 M parameters. On one H200 (jax 0.11.2) its 4,000 updates (131 M tokens) take less than two minutes when the card
does nothing else; beside other trainings they took three, and with compiling and evaluating four. The text was that of
docs/study.md. Held-out loss, nats/token, ± 0.03:

    steps           12     6      4      3
    update 1,000    4.517  3.928  3.846  3.846  (3 and 4 steps alone, until update 1,200)
    update 2,000    3.633  3.626  3.641  3.678
    update 3,000    3.491  3.444  3.450  3.481
    update 4,000    3.247  3.239  3.251  3.288
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(kind="decoder", vocab_size=16_384, width=768, heads=12, depth=12, max_length=1024),
        data=DataConfig(corpus="text"),
        step_sampling=StepSamplingConfig(kind="random_count", few_first=0.3),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=6e-3, muon_learning_rate=0.03, warmup=200, decay="linear", final_fraction=0.0
        ),
        train=TrainConfig(
            updates=4000, batch_size=32, length=1024, eval_every=1000, eval_batches=16, checkpoint_every=1000
        ),
    )
