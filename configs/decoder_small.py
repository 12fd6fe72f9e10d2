"""A decoder of GPT-2 small's shape, 12 x 768, one block shared by all depths, on your own text.

    python train.py --config=configs/decoder_small.py --workdir=runs/small \\
        --config.data.corpus=text --config.data.source=PATH

The run that was seen, on one H200 for three minutes, is in docs/results.md, "On a GPU".
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(kind="decoder", vocab_size=16_384, width=768, heads=12, depth=12, max_length=1024),
        data=DataConfig(corpus="text"),
        step_sampling=StepSamplingConfig(kind="random_count", counts=(3, 4, 6, 12)),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup=200),
        train=TrainConfig(
            updates=4000, batch_size=32, length=1024, eval_every=1000, eval_batches=16, checkpoint_every=1000
        ),
    )
