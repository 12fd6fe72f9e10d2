"""The rows of docs/study.md: a base, and what each changes in it."""

from typing import Any

from odelm.config import Config, DataConfig, ModelConfig, OptimizerConfig, StepSamplingConfig, TrainConfig

Options = dict[str, Any]

FIXED: Options = {"step_sampling.kind": "fixed"}
UNSHARED: Options = FIXED | {"model.time_modulation": False, "model.groups": -1}
"""A group for each layer: -1 stands for the depth."""
RECIPE: Options = {
    "model.wide_modulation": True, "model.parallel_branches": True, "step_sampling.few_first": 0.3,
}  # fmt: skip
BEST: Options = RECIPE | {"model.prelude": 1, "model.coda": 1}
MASKED: Options = {
    "model.kind": "encoder", "model.max_length": 128, "train.length": 128, "train.batch_size": 512,
}  # fmt: skip
POST: Options = {
    "model.norm": "layernorm", "model.norm_placement": "post", "model.norm_eps": 1e-12, "model.embed_norm": True,
    "model.positions": "learned", "model.qk_norm": False, "model.bias": True,
}  # fmt: skip
ADAMW: Options = {"optimizer.kind": "adamw", "optimizer.learning_rate": 5e-4}
FEW: Options = {"step_sampling.few_first": 0.5, "step_sampling.weights": (1.0, 2.0, 4.0)}
"""For three blocks, in 12, 6 or 3 steps."""
LARGE: Options = {"model.width": 1024, "model.heads": 16, "train.accumulate": 4}

ROWS: dict[str, Options] = {
    "unshared": UNSHARED,
    "unshared_half": UNSHARED | {"train.updates": 0.5},
    "fixed": FIXED,
    "random": {},
    "best": BEST,
    "best_twice": BEST | {"train.updates": 2.0},
    "best_groups": RECIPE | {"model.groups": 3},
    **{f"groups_{groups}": {"model.groups": groups} for groups in (2, 3, 4, 6)},
    "groups_3_few": FEW | {"model.groups": 3},
    "groups_3_few_long": FEW | {"model.groups": 3, "train.updates": 2.2},
    "equal_parameters": {"model.width": 1408, "model.heads": 22, "train.accumulate": 4},
    "equal_operations": {"train.updates": 2.0},
    "large_best": BEST | LARGE,
    "large_unshared": UNSHARED | LARGE,
    "distilled": {"train.distill": 0.5, "train.distill_from": 0.7},
    "taught": {"train.distill": 0.5, "train.distill_from": 0.0, "train.teacher": "unshared"},
    "encoder_unshared": MASKED | UNSHARED,
    "encoder_fixed": MASKED | FIXED,
    "encoder_random": MASKED,
    "encoder_best": MASKED | BEST,
    "encoder_post_fixed": MASKED | POST | FIXED,
    "encoder_post_random": MASKED | POST,
    "encoder_post_adamw": MASKED | POST | ADAMW,
}
"""What is changed in the base. `unshared_half` takes as long as `best`; `best_groups` is `best` with three blocks for a
third of the units each in place of one with prelude and coda; `groups_3_few` draws few steps more often, and no others
in the first half, so that `groups_3_few_long` takes about as long as `unshared`; `equal_parameters` has about as many
as `unshared`; `equal_operations` has twice the updates, because those of random counts take about half of the
operations of full depth, as does `best_twice`; `taught` learns from the first seed of a row that was trained before."""
TRAINED_AS = {
    "unshared_half": "unshared", "best_twice": "best", "equal_operations": "random",
    "groups_3_few_long": "groups_3_few",
}  # fmt: skip
"""Rows that are others trained for longer or shorter: they have their rates, and times of updates and passes."""
TUNED_AS = TRAINED_AS | {
    "encoder_best": "encoder_random", "encoder_fixed": "encoder_random", "encoder_post_fixed": "encoder_post_random",
    "large_best": "best", "large_unshared": "unshared",
}  # fmt: skip
"""Rows that have the rates of others."""
SHAPES: dict[str, Options] = {
    "study": {},
    "tiny": {"model.width": 32, "model.heads": 2, "model.vocab_size": 300, "model.max_length": 32, "train.length": 32,
             "train.batch_size": 4, "train.unroll": False, "train.eval_batches": 2},
}  # fmt: skip


def base(source: str, updates: int) -> Config:
    """Returns what every row starts from."""
    return Config(
        model=ModelConfig(kind="decoder", vocab_size=16_384, width=512, heads=8, depth=12, max_length=512),
        data=DataConfig(corpus="text", source=source, valid_fraction=0.01),
        step_sampling=StepSamplingConfig(kind="random_count"),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=4e-3, muon_learning_rate=0.02, warmup=100, decay="linear", final_fraction=0.0
        ),
        train=TrainConfig(updates=updates, batch_size=128, length=512, eval_batches=16, log_every=20, keep=1),
    )
