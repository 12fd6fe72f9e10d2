"""A small GPT-2, exactly: 12 x 512, a block for each layer; docs/adopt.md shares its layers.

    python train.py --config=configs/decoder_unshared.py --workdir=runs/decoder_unshared \\
        --config.data.corpus=text --config.data.source=PATH

On one H100 the first 4,000 updates take two and a half minutes and reach a held-out loss of 3.89 nats/token at 12 steps
(docs/adopt.md); nobody has run all 6,000 yet.
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            kind="decoder",
            vocab_size=16_384,
            width=512,
            heads=8,
            depth=12,
            groups=12,
            max_length=512,
            norm="layernorm",
            norm_eps=1e-5,
            positions="learned",
            qk_norm=False,
            bias=True,
            time_modulation=False,
        ),
        data=DataConfig(corpus="text"),
        step_sampling=StepSamplingConfig(kind="fixed"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=300, decay="linear", final_fraction=0.0),
        train=TrainConfig(
            updates=6000, batch_size=32, length=512, eval_every=1000, eval_batches=32, checkpoint_every=1000
        ),
    )
