"""The decoder that comes with odelm as `small-decoder`: 12 x 384, a block of its own at either end, 8.9 M parameters.

    python train.py --config=configs/shipped_decoder.py --workdir=runs/shipped_decoder --config.data.source=PATH
    python infer.py --workdir=runs/shipped_decoder --export=bundles/small-decoder --storage=int8 --steps=

PATH had 100 M tokens of books, Wikipedia, textbooks, technical documents and government texts. On one H200 the 10,500
updates (688 M tokens) took 4 minutes, and with preparing the text, compiling and evaluating less than 7. Held-out loss,
nats/token of 3.9 bytes, at 10, 4, 2 and 1 steps of the core, which are 12, 6, 4 and 3 evaluations in all:

    update 2,100    3.896  3.754  3.655  3.652  (steps of few evaluations alone, until update 3,150)
    update 4,200    3.511  3.516  3.530  3.590
    update 6,300    3.426  3.431  3.447  3.501
    update 8,400    3.329  3.333  3.349  3.405
    update 10,500   3.190  3.194  3.213  3.274
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            kind="decoder",
            vocab_size=8192,
            width=384,
            heads=6,
            depth=12,
            prelude=1,
            coda=1,
            parallel_branches=True,
            max_length=1024,
        ),
        data=DataConfig(corpus="text", valid_fraction=0.01),
        step_sampling=StepSamplingConfig(kind="random_count", few_first=0.3),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=6e-3, muon_learning_rate=0.03, warmup=200, decay="linear", final_fraction=0.0
        ),
        train=TrainConfig(
            updates=10_500, batch_size=64, length=1024, eval_every=2100, eval_batches=16, checkpoint_every=5250, keep=1
        ),
    )
