"""A whole recipe, and what its parts have to say to each other."""

from dataclasses import dataclass, field

from odelm.config.checks import check_types
from odelm.config.data import DataConfig
from odelm.config.init import InitConfig
from odelm.config.model import ModelConfig
from odelm.config.optimizer import OptimizerConfig
from odelm.config.step_sampling import StepSamplingConfig, default_steps
from odelm.config.tasks import TASKS
from odelm.config.training import MeshConfig, TrainConfig
from odelm.errors import InputError


@dataclass(frozen=True)
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    step_sampling: StepSamplingConfig = field(default_factory=StepSamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def validate(self, *, saved: bool = False) -> "Config":
        """Returns self, or raises InputError naming the first invalid field.

        That of a run (`saved`) may have counts above full depth, which were accepted before version 0.2.
        """
        check_types(self, "config")
        self.model.validate()
        self.data.validate()
        self.step_sampling.validate(self.model, saved=saved)
        self.optimizer.validate()
        self.train.validate(self.model)
        self.mesh.validate()
        self.init.validate()
        if self.model.sentence_order and self.packing != "documents":
            raise InputError(
                f"data.packing is {self.data.packing!r}, but a pair of segments with an order (model.sentence_order) "
                "is of one document: expected 'documents' or 'auto'"
            )
        if self.data.vocab_size is not None and self.data.vocab_size > self.model.vocab_size:
            raise InputError(
                f"data.vocab_size is {self.data.vocab_size}, more than model.vocab_size {self.model.vocab_size}"
            )
        self._check_task()
        return self

    def _check_task(self) -> None:
        """Checks that the model is one for the task."""
        if not self.data.task:
            return
        if self.model.kind != "encoder":
            raise InputError(
                f"data.task is {self.data.task!r}, but model.kind is {self.model.kind!r}: fine-tuning takes an encoder"
            )
        if self.train.teacher:
            raise InputError(
                f"data.task is {self.data.task!r}, but train.teacher teaches language models: leave it out, or let the "
                "model learn from its own full depth (train.distill)"
            )
        outputs = TASKS[self.data.task].outputs
        if self.model.outputs not in (0, outputs):
            raise InputError(
                f"model.outputs is {self.model.outputs}, but the task {self.data.task!r} has {outputs}: leave it out"
            )

    @property
    def packing(self) -> str:
        """What a row of data holds, `auto` decided."""
        if self.data.packing != "auto":
            return self.data.packing
        return "documents" if self.model.sentence_order else "concatenate"

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The step counts that random sampling draws from, one for each weight."""
        return self.step_sampling.counts_of(self.model)

    @property
    def trained_counts(self) -> tuple[int, ...]:
        """Every step count that training can draw, ascending: one executable is compiled for each."""
        if self.step_sampling.kind == "fixed":
            return (self.model.core,)
        counts, weights = self.step_counts, self.step_sampling.weights
        drawn = {count for count, weight in zip(counts, weights, strict=True) if weight} if weights else set(counts)
        return tuple(sorted(drawn))

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """The step counts to evaluate at, full depth first, then the others from the most steps down."""
        if self.train.eval_steps:
            return (self.model.core, *sorted(set(self.train.eval_steps) - {self.model.core}, reverse=True))
        return default_steps(self.model)
