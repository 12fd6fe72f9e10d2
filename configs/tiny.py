"""A decoder small enough to train on two CPU cores in minutes: the demo.

    python train.py --config=configs/tiny.py --workdir=runs/tiny

The first half was seen on two busy CPU cores: held-out loss near 4.9 at 12, 6, 4 and 3 steps after 250 of its 500
updates. It has not been run to the end.
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(kind="decoder", vocab_size=2048, width=128, heads=4, depth=12, max_length=256),
        data=DataConfig(corpus="python_source"),
        step_sampling=StepSamplingConfig(kind="random_count", counts=(3, 4, 6, 12)),
        optimizer=OptimizerConfig(learning_rate=6e-3, warmup=60),
        train=TrainConfig(updates=500, batch_size=8, length=128, eval_every=125, eval_batches=16, checkpoint_every=125),
    )
