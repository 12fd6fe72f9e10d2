"""Quantised models against the model that they were made from: size, latency and held-out loss at each step count."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from odelm.data.loader import train_batches
from odelm.data.prepare import prepare
from odelm.errors import InputError
from odelm.evals.compare import Comparison, Loaded, batches_of, held_out, length_of, text_of, trained_counts
from odelm.evals.report import make_report, publish
from odelm.evals.sweep import (
    Measured,
    Row,
    Setting,
    evaluations_of,
    latencies_of,
    loss_of,
    make_calls,
    make_row,
    settings,
)
from odelm.infer.quantize import kind_of, quantize
from odelm.infer.runner import Runner
from odelm.models.inputs import Inputs
from odelm.models.loss import Batch, inputs_of
from odelm.models.parameters import parameter_bytes
from odelm.models.transformer import DepthPlan
from odelm.run_directory import TOKENIZER

CALIBRATION_TOKENS = 8192
"""About how many tokens of the text inputs are calibrated on; only the largest input counts."""


def compare_quantized(
    loaded: Loaded,
    kinds: Sequence[str],
    steps: tuple[int, ...],
    options: Comparison,
    *,
    source: Path,
    step: int | None,
    out: Path | None = None,
) -> Path:
    """Measures a model and its quantised copies at each step count, prints the table, and returns the directory of the
    written report.

    The rows are those of `odelm.evals.compare.compare`, with `quantize`, a kind or None, and `bytes`, the size of the
    parameters. Each is compared with the unquantised model at full depth. Other arguments and errors are those of
    `compare`.

    Args:
        kinds: names in `odelm.infer.quantized.KINDS`.
    """
    model, config, _ = loaded
    length = length_of(config, options, run=step is not None)
    runner = Runner.of(model)
    chosen = settings(runner, steps, solver=options.solver)
    plans = [setting.plan(runner) for setting in chosen]
    runners = {None: runner} | {
        kind: Runner.of(quantized(loaded, kind, options, plans=plans, source=source, step=step)) for kind in kinds
    }
    rows, batches = batches_of(loaded, options, source=source, step=step)
    measured = _measured(runners, chosen, options, length, batches)
    out = source / "infer" if out is None else out
    text = None if rows is None else text_of(rows, batches, config, options)
    trained = trained_counts(config, source, step)
    return publish(make_report(config.model, measured, step=step, text=text, trained=trained), out, width=120)


def quantized(
    loaded: Loaded,
    kind: str,
    options: Comparison,
    *,
    plans: Sequence[DepthPlan],
    source: Path,
    step: int | None,
) -> Any:
    """Returns the quantised copy of what `odelm.load` returned from `source`.

    Static kinds are calibrated along `plans`: a run on its own training text, and any model on `options.text` if that
    is given. Raises InputError for an unknown kind, and for a static one without text.
    """
    if kind_of(kind).inputs != "static":
        return quantize(loaded[0], kind)
    return quantize(loaded[0], kind, calibration=[_calibration(loaded, kind, options, source, step)], plan=plans)


def _calibration(loaded: Loaded, kind: str, options: Comparison, source: Path, step: int | None) -> Inputs:
    """Returns whole rows of text, up to about `CALIBRATION_TOKENS` tokens."""
    _, config, _ = loaded
    if options.text is not None:
        rows = held_out(loaded, options, tokenizer_file=None)
        length = length_of(config, options, run=step is not None)
        batch = next(rows.batches(min(len(rows), max(CALIBRATION_TOKENS // length, 1))))
    elif step is not None:
        try:
            batch = next(train_batches(prepare(config, tokenizer_file=source / TOKENIZER), config))
        except InputError as error:
            raise InputError(
                f"{kind} is calibrated on text, and that of the run cannot be read ({error}): give --text=FILE"
            ) from error
    else:
        raise InputError(f"{kind} is calibrated on text: give --text=FILE")
    length = batch["tokens"].shape[1]
    return inputs_of({name: array[: max(CALIBRATION_TOKENS // length, 1)] for name, array in batch.items()})


def _measured(
    runners: dict[Any, Runner], chosen: Sequence[Setting], options: Comparison, length: int, batches: Sequence[Batch]
) -> list[Row]:
    """Returns a row for each kind and setting, timed in turns; the first is the one that others are compared with."""
    calls = {
        (kind, setting): call
        for kind, runner in runners.items()
        for setting, call in make_calls(runner, chosen, batch=options.batch, length=length).items()
    }
    latencies = latencies_of(calls, options.repeats)
    found = {
        (kind, setting): Measured(
            latencies[kind, setting], evaluations_of(runner, setting), loss_of(runner, setting, batches)
        )
        for kind, runner in runners.items()
        for setting in chosen
    }
    full = found[None, chosen[0]]
    return [
        make_row(setting, measured, full, options.batch, length)
        | {"quantize": kind, "bytes": parameter_bytes(runners[kind].model)}
        for (kind, setting), measured in found.items()
    ]
