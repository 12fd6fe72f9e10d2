"""The log of a run: `metrics.jsonl`, TensorBoard events, and a progress bar, or lines where there is no terminal. Only
the first process writes."""

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from odelm.data.scores import TaskScores
from odelm.errors import InputError, RunFailure
from odelm.files import fingerprint, write_text
from odelm.models.loss import MeanLoss
from odelm.train.window import Record

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Log:
    """Writes metrics as they are reported; a context manager. With `enabled` False it writes nothing."""

    def __init__(
        self,
        workdir: Path,
        *,
        updates: int,
        start: int,
        enabled: bool = True,
        wandb: str = "",
        options: Mapping[str, Any] | None = None,
    ):
        """With `wandb`, the name of a project, the scalars go to Weights & Biases too, and `options` with them."""
        self.enabled = enabled
        self._workdir, self._updates = workdir, updates
        self.console = Console(quiet=not enabled)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s{task.fields[more]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not enabled or not self.console.is_terminal,
        )
        # The bar appears with its first loss; a run that is already finished reports none.
        self._curves: dict[int, dict[int, float]] = {}
        self._task = self._progress.add_task(
            "training", total=updates, completed=start, visible=False, loss=float("nan"), speed=0.0, more=""
        )
        if enabled:
            # TensorBoard's writer takes half a second to import, and only training needs it.
            from tensorboardX import SummaryWriter

            try:
                _drop_after(workdir / METRICS, start)
                self._file = (workdir / METRICS).open("a")
                self._events = SummaryWriter(str(workdir / TENSORBOARD), purge_step=start + 1)
            except OSError as error:
                raise self._unwritten(error) from error
        self._wandb = _wandb_run(wandb, workdir, options or {}) if enabled and wandb else None

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._progress.stop()
        if self.enabled:
            try:
                self._file.close()
                self._events.close()
            except OSError as error:
                # If the run has already failed, for example on a full disk, report that failure instead.
                if kind is None:
                    raise self._unwritten(error) from error
        if self._wandb is not None:
            self._wandb.finish()

    def print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def training(self, step: int, record: Record) -> None:
        """Records the updates up to `step`; `loss` and `tokens_per_s` also show in the bar, or as a line."""
        loss = math.nan if record["loss"] is None else record["loss"]
        share = record.get("model_flops_utilisation")
        used = "" if share is None else f", {share:.0%} of the peak"
        if (waited := record.get("data_wait", 0.0)) > 0.01:
            used += f", {waited:.0%} waiting for data"
        if not self.console.is_terminal:
            self.print(f"update {step}/{self._updates}: loss {loss:.4f}, {record['tokens_per_s']:,.0f} tokens/s{used}")
        if record.get("skipped"):
            self.print(f"update {step}: {record['skipped']} updates skipped, whose loss or gradient was non-finite")
        self._progress.update(
            self._task,
            completed=step,
            visible=True,
            loss=loss,
            speed=record["tokens_per_s"],
            more=used,
            refresh=False,
        )
        scalars = {f"train/{name}": value for name, value in record.items() if isinstance(value, int | float)}
        by_steps = record.get("loss_by_steps", {}).items()
        scalars |= {f"train/loss_{steps}_steps": value for steps, value in by_steps if value is not None}
        self._write({"step": step, **record}, scalars)

    def evaluation(
        self,
        step: int,
        losses: dict[int, MeanLoss],
        *,
        batches: int,
        documents: int,
        norms: Mapping[str, list[float]] | None = None,
        components: Mapping[str, float] | None = None,
        scores: TaskScores | None = None,
    ) -> None:
        """Records held-out losses by number of depth steps, over so many batches (0: the whole split).

        The values that `train.watch` asks for are recorded with them: `norms` along the depth, the losses of
        `components`, and an image of the losses over steps. `scores` are the metrics of a task.
        """
        full, norms, components = next(iter(losses.values())), norms or {}, components or {}
        shown = "  ".join(f"{steps} steps {mean.loss:.4f}" for steps, mean in losses.items())
        text = f"{full.tokens:,} tokens of {documents:,} documents"
        of = f"± {full.stderr:.4f} on {text if scores is None else f'{documents:,} examples'}"
        self.print(f"update {step}: held-out loss  {shown}  ({of})")
        for line in _scores_lines(scores) if scores else ():
            self.print(f"update {step}: {line}")
        if components:
            by_name = "  ".join(f"{name} {loss:.4f}" for name, loss in components.items())
            self.print(f"update {step}: held-out loss at full depth  {by_name}")
        record = {
            "step": step,
            "eval_loss": {str(steps): _finite(mean.loss) for steps, mean in losses.items()},
            "eval_stderr": {str(steps): _finite(mean.stderr) for steps, mean in losses.items()},
            "eval_batches": batches,
            "eval_tokens": full.tokens,
            "eval_documents": documents,
            **(_scores_record(scores) if scores else {}),
            **({"eval_loss_by_component": {n: _finite(loss) for n, loss in components.items()}} if components else {}),
            **{f"{name}_norms": [_finite(value) for value in values] for name, values in norms.items()},
        }
        scalars = {f"eval/loss_{steps}_steps": mean.loss for steps, mean in losses.items()}
        for steps, found in scores.by_steps.items() if scores else ():
            scalars |= {f"eval/{name}_{steps}_steps": value for name, value in found.items()}
        scalars |= {f"eval/loss_of_{name}": loss for name, loss in components.items()}
        scalars |= {f"depth/{name}_norm_{unit:02}": value for name, values in norms.items()
                    for unit, value in enumerate(values)}  # fmt: skip
        self._write(record, scalars)
        if norms and self.enabled:
            from odelm.train.curve import draw_curve  # matplotlib takes a second to import

            self._curves[step] = {steps: mean.loss for steps, mean in losses.items()}
            self._events.add_figure("eval/loss_over_steps", draw_curve(self._curves), step)

    def comparison(self, before: dict[int, float], after: dict[int, float]) -> None:
        """Prints a line for each step count that was evaluated before and after training."""
        for steps in (steps for steps in after if steps in before):
            change = after[steps] / before[steps] - 1
            self.print(
                f"{steps} steps: held-out loss before {before[steps]:.4f}, after {after[steps]:.4f} ({change:+.2%})"
            )

    def evaluated(self, step: int, batches: int) -> dict[int, float]:
        """Returns the held-out losses recorded after update `step` over so many batches; empty if there are none."""
        return evaluated(self._workdir, batches).get(step, {})

    def _write(self, record: dict, scalars: Mapping[str, float]) -> None:
        if not self.enabled:
            return
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritten(error) from error
        for name, value in scalars.items():
            self._events.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=record["step"])

    def _unwritten(self, error: OSError) -> RunFailure:
        return RunFailure(
            f"the metrics in {self._workdir} cannot be written ({error}); make room or mend that, and run the same "
            "command to resume"
        )


def evaluated(workdir: Path, batches: int) -> dict[int, dict[int, float]]:
    """Returns the held-out losses over so many batches that a run has recorded, by update and by number of depth steps,
    full depth first."""
    found: dict[int, dict[int, float]] = {}
    for line in _lines(workdir / METRICS):
        if math.isinf(_step_of(line)):
            continue
        record = json.loads(line)
        # Runs before 0.2 recorded no number of tokens: their losses are of the first documents of the split.
        if record.get("eval_batches") == batches and "eval_tokens" in record:
            found[record["step"]] = _by_count(record.get("eval_loss"))
    return found


def _by_count(losses: Any) -> dict[int, float]:
    """Returns recorded losses by number of depth steps; {} if somebody else has changed them, or if they are not
    numbers."""
    if not isinstance(losses, dict) or not all(isinstance(loss, float | int) for loss in losses.values()):
        return {}
    try:
        return {int(steps): loss for steps, loss in losses.items()}
    except ValueError:
        return {}


def check_wandb() -> None:
    """Raises InputError if Weights & Biases is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError('--wandb needs the package wandb, which is not installed: pip install "odelm[wandb]"')


def _wandb_run(project: str, workdir: Path, options: Mapping[str, Any]) -> Any:
    """Returns the run of a workdir in a project: a new one, or the workdir's earlier one."""
    import wandb  # pyright: ignore[reportMissingImports]

    name = str(workdir.absolute())
    try:
        return wandb.init(
            project=project, name=workdir.name, id=fingerprint(name), resume="allow", dir=name, config=dict(options)
        )
    except wandb.Error as error:
        raise InputError(
            f"--wandb={project} cannot be opened ({error}); log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error


def _scores_lines(scores: TaskScores) -> Iterator[str]:
    for name, majority in scores.majority.items():
        shown = "  ".join(f"{steps} steps {found[name]:.4f}" for steps, found in scores.by_steps.items())
        yield f"{name}  {shown}  (majority {majority:.4f})"


def _scores_record(scores: TaskScores) -> Record:
    by_steps = {
        str(steps): {name: _finite(value) for name, value in of_steps.items()}
        for steps, of_steps in scores.by_steps.items()
    }
    return {"eval_metrics": by_steps, "eval_majority": scores.majority, "eval_examples": scores.examples}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _drop_after(path: Path, step: int) -> None:
    """Removes the records after the checkpoint from which an interrupted run resumes, and lines that are damaged."""
    if path.exists():
        write_text(path, "".join(line + "\n" for line in _lines(path) if _step_of(line) <= step))


def _lines(path: Path) -> list[str]:
    """Returns the lines of a file; bytes that are not text leave a line that is not a record."""
    return path.read_bytes().decode(errors="replace").split("\n") if path.exists() else []


def _step_of(line: str) -> float:
    """Returns the step of a record; a line that is not a record, such as one cut short by a kill, counts as later than
    any record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf
