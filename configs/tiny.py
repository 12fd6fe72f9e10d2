"""A decoder small enough to train on two CPU cores in minutes: the demo."""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(kind="decoder", vocab_size=2048, width=128, heads=4, depth=12, max_length=256),
        data=DataConfig(corpus="python_source"),
        step_sampling=StepSamplingConfig(kind="random_count", counts=(3, 4, 6, 12)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=50),
        train=TrainConfig(updates=300, batch_size=16, length=128, eval_every=100, eval_batches=8, checkpoint_every=100),
    )
