"""The log of a run: `metrics.jsonl`, TensorBoard events, and a progress bar, or lines where there is no terminal. Only
the first process writes."""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from odelm.models.loss import MeanLoss

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Log:
    """Writes metrics as they are reported; a context manager. With `enabled` False it writes nothing."""

    def __init__(self, workdir: Path, *, updates: int, start: int, enabled: bool = True):
        self.enabled = enabled
        self._workdir, self._updates = workdir, updates
        self.console = Console(quiet=not enabled)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not enabled or not self.console.is_terminal,
        )
        # The bar appears with its first loss; a run that is already finished reports none.
        self._task = self._progress.add_task(
            "training", total=updates, completed=start, visible=False, loss=float("nan"), speed=0.0
        )
        if enabled:
            # TensorBoard's writer takes half a second to import, and only training needs it.
            from tensorboardX import SummaryWriter

            _drop_after(workdir / METRICS, start)
            self._file = (workdir / METRICS).open("a")
            self._events = SummaryWriter(str(workdir / TENSORBOARD), purge_step=start + 1)

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self.enabled:
            self._file.close()
            self._events.close()

    def print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def training(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of an update; `loss` and `tokens_per_s` also show in the bar, or as a line."""
        if not self.console.is_terminal:
            self.print(
                f"update {step}/{self._updates}: loss {metrics['loss']:.4f}, {metrics['tokens_per_s']:,.0f} tokens/s"
            )
        self._progress.update(
            self._task, completed=step, visible=True, loss=metrics["loss"], speed=metrics["tokens_per_s"], refresh=False
        )
        self._write({"step": step, **metrics}, {f"train/{name}": value for name, value in metrics.items()})

    def evaluation(self, step: int, losses: dict[int, MeanLoss], *, batches: int, documents: int) -> None:
        """Records held-out losses by number of depth steps, over so many batches (0: the whole split)."""
        full = next(iter(losses.values()))
        shown = "  ".join(f"{steps} steps {mean.loss:.4f}" for steps, mean in losses.items())
        of = f"± {full.stderr:.4f} on {full.tokens:,} tokens of {documents:,} documents"
        self.print(f"update {step}: held-out loss  {shown}  ({of})")
        record = {
            "step": step,
            "eval_loss": {str(steps): mean.loss for steps, mean in losses.items()},
            "eval_stderr": {str(steps): _finite(mean.stderr) for steps, mean in losses.items()},
            "eval_batches": batches,
            "eval_tokens": full.tokens,
            "eval_documents": documents,
        }
        self._write(record, {f"eval/loss_{steps}_steps": mean.loss for steps, mean in losses.items()})

    def comparison(self, before: dict[int, float], after: dict[int, float]) -> None:
        """Prints a line for each step count that was evaluated before and after training."""
        for steps in (steps for steps in after if steps in before):
            change = after[steps] / before[steps] - 1
            self.print(
                f"{steps} steps: held-out loss before {before[steps]:.4f}, after {after[steps]:.4f} ({change:+.2%})"
            )

    def evaluated(self, step: int, batches: int) -> dict[int, float]:
        """Returns the held-out losses recorded after update `step` over so many batches; empty if there are none."""
        path = self._workdir / METRICS
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if _step_of(line) == step]
        # Runs before 0.2 recorded no number of tokens: their losses are of the first documents of the split.
        found = [r["eval_loss"] for r in records if r.get("eval_batches") == batches and "eval_tokens" in r]
        return {int(steps): loss for steps, loss in found[-1].items()} if found else {}

    def _write(self, record: dict, scalars: dict[str, float]) -> None:
        if not self.enabled:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, record["step"])


class Window:
    """The updates since the last record of the log, and the time that they took."""

    def __init__(self) -> None:
        self._metrics: list[dict[str, Any]] = []
        self._since = time.perf_counter()

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds an update, which may still be running on the device."""
        self._metrics.append(metrics)

    def leave_out(self, seconds: float) -> None:
        """Subtracts time that was not spent on updates."""
        self._since += seconds

    def close(self, *, tokens: int, waited: float) -> dict[str, float]:
        """Returns the metrics of the updates, of `tokens` tokens each, and starts again.

        `loss` is their mean, `gradient_norm` the last one's; `waited` is the time in seconds spent waiting for data.
        """
        metrics = [{name: float(value) for name, value in m.items()} for m in jax.device_get(self._metrics)]
        now = time.perf_counter()
        seconds = now - self._since
        self._metrics, self._since = [], now
        return {
            "loss": sum(m["loss"] for m in metrics) / len(metrics),
            "gradient_norm": metrics[-1]["gradient_norm"],
            "tokens_per_s": len(metrics) * tokens / seconds,
            "data_wait": waited / seconds,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _drop_after(path: Path, step: int) -> None:
    """Removes the records after the checkpoint from which an interrupted run resumes."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(path)


def _step_of(line: str) -> float:
    """Returns the step of a record; a line cut short by a kill counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
