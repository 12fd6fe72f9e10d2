"""A small ALBERT, exactly: 12 x 512, trained with unit steps alone, as existing models are; docs/adopt.md adapts it.

    python train.py --config=configs/encoder_small.py --workdir=runs/encoder_small \\
        --config.data.corpus=text --config.data.source=PATH

It has not been run yet.
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            kind="encoder",
            vocab_size=16_384,
            width=512,
            heads=8,
            depth=12,
            embed_dim=128,
            max_length=512,
            norm="layernorm",
            norm_placement="post",
            norm_eps=1e-12,
            embed_norm=True,
            positions="learned",
            qk_norm=False,
            bias=True,
            token_types=2,
            time_modulation=False,
        ),
        data=DataConfig(corpus="text"),
        step_sampling=StepSamplingConfig(kind="fixed"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup=1000, decay="linear", final_fraction=0.0, weight_decay=0.01
        ),
        train=TrainConfig(
            updates=15_000, batch_size=128, length=128, eval_every=1000, eval_batches=64, checkpoint_every=1000
        ),
    )
