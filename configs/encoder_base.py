"""A masked language model of ALBERT base's shape, 12 x 768 with factorised embeddings, on your own text.

    python train.py --config=configs/encoder_base.py --workdir=runs/encoder_base \\
        --config.data.corpus=text --config.data.source=PATH

The arithmetic is ALBERT's (post-norm, learned positions, token types, sentence order), plus time modulation;
`--config.model.time_modulation=false` is ALBERT exactly. The optimizer is not: with AdamW (5e-4, 1,000 updates of
warmup, weight decay 0.01) and a vocabulary of 16,384, 4,000 updates (131 M tokens, less than two minutes on one H200)
hardly learned more than how frequent tokens are. Held-out loss, nats per masked token, ± 0.02:

    steps           12     6      4      3
    update 1,000    6.876  6.841  6.835  6.842
    update 2,000    6.613  6.595  6.593  6.596
    update 4,000    6.474  6.468  6.468  6.471

With Muon, at the rates below, a narrower model of the same kind had 3.17 at 12 steps and 3.18 at 3 after 65 M tokens
(`encoder_post_random` of docs/study.md). This recipe has not been run with it yet.
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
            kind="muon", learning_rate=4e-3, muon_learning_rate=0.02, warmup=500, decay="linear", final_fraction=0.0
        ),
        train=TrainConfig(
            updates=20_000, batch_size=64, length=512, eval_every=1000, eval_batches=16, checkpoint_every=1000
        ),
    )
