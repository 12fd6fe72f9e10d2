"""A decoder small enough to train on two CPU cores in minutes: the demo.

    python train.py --config=configs/tiny.py --workdir=runs/tiny

On two CPU cores its 500 updates take about two minutes, and reach a held-out loss of 3.95 nats/token at 12 steps and
3.97 at 3 (docs/results.md, "The demo"). Muon, with few steps in the first 40 % of the updates, was the best recipe at
equal time ("Recipes at equal time").
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(kind="decoder", vocab_size=2048, width=128, heads=4, depth=12, max_length=256),
        data=DataConfig(corpus="python_source"),
        step_sampling=StepSamplingConfig(kind="random_count", few_first=0.4),
        optimizer=OptimizerConfig(kind="muon", learning_rate=1.2e-2, muon_learning_rate=4e-2, warmup=60),
        train=TrainConfig(updates=500, batch_size=8, length=128, eval_every=250, eval_batches=16, checkpoint_every=125),
    )
