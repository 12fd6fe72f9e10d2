"""A masked language model of ALBERT base's shape, 12 x 768 with factorised embeddings, on your own text.

    python train.py --config=configs/encoder_base.py --workdir=runs/encoder_base \\
        --config.data.corpus=text --config.data.source=PATH

The arithmetic is ALBERT's (post-norm, learned positions, token types, sentence order), plus time modulation;
`--config.model.time_modulation=false` is ALBERT exactly. It has not been run yet: the learning rate is what the
smaller `configs/encoder_small.py` was stable at.
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            kind="encoder",
            vocab_size=30_000,
            width=768,
            heads=12,
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
            sentence_order=True,
        ),
        data=DataConfig(corpus="text"),
        step_sampling=StepSamplingConfig(kind="random_count"),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, warmup=1000, decay="linear", final_fraction=0.0, weight_decay=0.01
        ),
        train=TrainConfig(
            updates=20_000, batch_size=64, length=512, eval_every=1000, eval_batches=16, checkpoint_every=1000
        ),
    )
