"""A decoder of GPT-2 medium's shape, 24 x 1024, one block shared by all depths, on your own text.

    python train.py --config=configs/decoder_medium.py --workdir=runs/medium \\
        --config.data.corpus=text --config.data.source=PATH

On one H200 (jax 0.11.2) 1,500 updates (49 M tokens) in place of 20,000, with a vocabulary of 16,384, took 3 min 22 s
beside other trainings, at 240,000 tokens/s, and with compiling and evaluating 4 min 33 s. The text was that of
docs/study.md. Held-out loss, nats/token, ± 0.03:

    steps           24     12     8      6
    update 500      4.318  4.255  4.268  4.312
    update 1,000    3.734  3.700  3.707  3.730
    update 1,500    3.393  3.381  3.387  3.405
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(kind="decoder", vocab_size=32_768, width=1024, heads=16, depth=24, max_length=1024),
        data=DataConfig(corpus="text"),
        step_sampling=StepSamplingConfig(kind="random_count", few_first=0.3),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=6e-3, muon_learning_rate=0.03, warmup=500, decay="linear", final_fraction=0.0
        ),
        train=TrainConfig(
            updates=20_000, batch_size=32, length=1024, eval_every=1000, eval_batches=16, checkpoint_every=1000
        ),
    )
