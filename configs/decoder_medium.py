"""A decoder of GPT-2 medium's shape, 24 x 1024, one block shared by all depths, on your own text.

    python train.py --config=configs/decoder_medium.py --workdir=runs/medium \\
        --config.data.corpus=text --config.data.source=PATH

Muon with few steps first was the best recipe at equal time in a model of half its width (docs/results.md, "Recipes at
equal time"); this recipe itself has not been run yet.
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(kind="decoder", vocab_size=32_768, width=1024, heads=16, depth=24, max_length=1024),
        data=DataConfig(corpus="text"),
        step_sampling=StepSamplingConfig(kind="random_count", few_first=0.3),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=6e-3, muon_learning_rate=0.03, warmup=500, decay="linear", final_fraction=0.0
        ),
        train=TrainConfig(
            updates=20_000, batch_size=32, length=1024, eval_every=1000, eval_batches=16, checkpoint_every=1000
        ),
    )
