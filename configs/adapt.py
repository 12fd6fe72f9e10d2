"""An existing model, as Hugging Face folder or run, made fit for coarse steps by further training on your own text.

    python train.py --config=configs/adapt.py --workdir=runs/adapted --config.init.from_pretrained=FOLDER \\
        --config.data.source=PATH

The model and its tokenizer are the folder's. The options of `config.init` can share the layers of an ordinary BERT or
GPT-2 among fewer blocks first. The learning rate is what the rest hangs on: too low, and coarse steps are not learned
in the time; too high, and a post-norm model collapses. What was seen at which is in docs/adopt.md.
"""

from odelm.config import Config, DataConfig, OptimizerConfig, StepSamplingConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(corpus="text"),
        step_sampling=StepSamplingConfig(kind="random_count", anneal=0.4),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup=100, decay="linear", final_fraction=0.0),
        train=TrainConfig(
            updates=2000, batch_size=32, length=512, eval_every=500, eval_batches=16, checkpoint_every=500
        ),
    )
