"""A decoder of GPT-2 small's shape, 12 x 768, one block shared by all depths, on your own text.

    python train.py --config=configs/decoder_small.py --workdir=runs/small \\
        --config.data.corpus=text --config.data.source=PATH

Muon with few steps first was the best recipe at equal time in a model of two thirds of its width (docs/results.md,
"Recipes at equal time"); this recipe itself has not been run with it. With AdamW ("On a GPU" there) 2,500 updates took
less than four minutes on one H100 and reached a held-out loss of 3.83 nats/token at 12 steps and 3.87 at 3.
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(kind="decoder", vocab_size=16_384, width=768, heads=12, depth=12, max_length=1024),
        data=DataConfig(corpus="text"),
        step_sampling=StepSamplingConfig(kind="random_count", few_first=0.3),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=6e-3, muon_learning_rate=0.03, warmup=200, decay="linear", final_fraction=0.0
        ),
        train=TrainConfig(
            updates=4000, batch_size=32, length=1024, eval_every=1000, eval_batches=16, checkpoint_every=1000
        ),
    )
