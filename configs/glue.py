"""An encoder fine-tuned on a task of GLUE, with random step counts, and evaluated at several; see docs/fine-tuning.md.

    python train.py --config=configs/glue.py --workdir=runs/sst2 --config.data.task=sst2 --config.data.source=GLUE \\
        --config.init.from_pretrained=MODEL

GLUE is the folder that has the folders of the tasks (SST-2, RTE, ...), MODEL a run directory, a bundle or a Hugging
Face folder of an encoder; without it a small encoder starts from new parameters. `--seeds=5` trains five seeds and
prints their mean and spread. What a small model reaches is in docs/fine-tuning.md.
"""

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            kind="encoder", vocab_size=2048, width=128, heads=4, depth=12, max_length=256, token_types=2, dropout=0.1
        ),
        data=DataConfig(task="sst2"),
        step_sampling=StepSamplingConfig(kind="random_count"),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup=100, decay="linear", final_fraction=0.0, weight_decay=0.01
        ),
        train=TrainConfig(
            updates=1000, batch_size=32, length=128, eval_every=250, eval_batches=0, checkpoint_every=250
        ),
    )
