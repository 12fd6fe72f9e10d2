"""A post-norm masked language model small enough to train on two CPU cores in minutes.

    python train.py --config=configs/tiny_encoder.py --workdir=runs/tiny_encoder

On two CPU cores its 600 updates take about four minutes, and reach a held-out loss of 5.87 nats/token at 12 steps and
5.85 at 3 (docs/results.md): a masked model learns slower than a causal one, and is only leaving the plateau of token
frequencies then. Raise `--config.train.updates` to see it learn more from context.
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            kind="encoder",
            vocab_size=2048,
            width=128,
            heads=4,
            depth=12,
            embed_dim=64,
            max_length=256,
            norm="layernorm",
            norm_placement="post",
            embed_norm=True,
            positions="learned",
            qk_norm=False,
            bias=True,
        ),
        data=DataConfig(corpus="python_source"),
        step_sampling=StepSamplingConfig(kind="random_count"),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=100),
        train=TrainConfig(
            updates=600, batch_size=16, length=128, eval_every=150, eval_batches=16, checkpoint_every=150
        ),
    )
