"""The quality dial: the cheapest way to cross the depth that keeps a limit on the loss, with a confidence of 95 %.

Candidates are searched on one half of the held-out text. The other half, with other documents, tests the best candidate
for each number of evaluations (`odelm.evals.confidence`). The choice is stored as an `odelm.profile.Profile`.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from odelm import profile as profiles
from odelm.config import Config, ModelConfig
from odelm.errors import InputError
from odelm.evals.candidates import evaluations_of, times_of
from odelm.evals.compare import Comparison, Loaded, batch_size, held_out, length_of, text_of, trained_counts
from odelm.evals.confidence import CONFIDENCE
from odelm.evals.halves import halves
from odelm.evals.report import make_report, percent, publish
from odelm.evals.row_nats import Half
from odelm.evals.search import Choice, choose, search_on
from odelm.evals.sweep import Row, timed
from odelm.infer.runner import Runner
from odelm.models.loss import mean_loss_of_rows
from odelm.profile import PROFILE, Profile
from odelm.run_directory import TOKENIZER

EVAL_BATCHES = 32
"""Batches of 32 sequences, searched and tested together, unless a number is given."""
REPORT = "dial"
"""The name of the report's files, which are beside those of a comparison."""


def find_profile(
    loaded: Loaded, limit: float, options: Comparison, *, source: Path, step: int | None, out: Path | None = None
) -> Path:
    """Searches for the cheapest crossing that keeps the limit, prints its table, and returns the path of its profile.

    Args:
        loaded: as `odelm.load` returns it, from `source`.
        limit: the increase of the loss that is allowed, relative to full depth: 0.005 is half a per cent.
        options: the text, the length of its rows, and what is timed; its solver and integrator are not used.
        step: the run's checkpoint; None for a Hugging Face folder.
        out: the directory of profile and report; if None, the profile is in the source, and the report in its `infer`.

    Raises InputError, before anything is written, if no candidate keeps the limit or there is no text; and if the files
    cannot be written.
    """
    model, config, _ = loaded
    if options.eval_batches is None:
        options = dataclasses.replace(options, eval_batches=EVAL_BATCHES)
    if config.model.core == config.model.groups:
        raise InputError(f"each of the model's {config.model.groups} blocks has a single step: there are no fewer")
    rows = held_out(loaded, options, tokenizer_file=None if step is None else source / TOKENIZER)
    length = length_of(config, options, run=step is not None)
    search, unseen = (Half.of(part, batch_size(len(part.rows), length)) for part in halves(rows))
    runner = Runner.of(model)
    seen, candidates = search_on(runner, search)
    choice = choose(runner, seen, search, unseen, limit)
    if choice.chosen is None:
        raise InputError(_unreachable(config.model, choice, limit))
    text, searched = (_text(half, config, options) for half in (unseen, search))
    trained = trained_counts(config, source, step)
    report = make_report(
        config.model, _rows(runner, choice, unseen, options, length), step=step, text=text, trained=trained
    )
    report["dial"] = {
        "max_loss_increase": limit,
        "confidence": CONFIDENCE,
        "candidates": candidates,
        "searched": searched,
        "units": "documents" if unseen.part.documents else "rows",
    }
    path = (source if out is None else out) / PROFILE
    profile = _profile(loaded, choice, limit, text, unseen.part.documents)
    profiles.write(profile, path)
    publish(report, source / "infer" if out is None else out, name=REPORT)
    print(_told(profile))
    if out is not None:
        print(f"to use it: infer.py --profile_file={path}, or odelm.load(.., profile={str(path)!r})")
    return path


def _text(half: Half, config: Config, options: Comparison) -> dict[str, Any]:
    """Returns the description of a half for the report."""
    text = text_of(half.part.rows, half.batches, config, options)
    return text | ({"documents": half.part.documents} if half.part.documents else {})


def _rows(runner: Runner, choice: Choice, half: Half, options: Comparison, length: int) -> list[Row]:
    """Returns the rows of the report: full depth, and the best for each number of evaluations."""
    real = half.tokens > 0
    losses = {
        setting: mean_loss_of_rows(nats[real], half.tokens[real].astype(np.float64))
        for setting, nats in choice.nats.items()
    }
    rows = timed(runner, losses, batch=options.batch, length=length, repeats=options.repeats)
    for setting, row in zip(losses, rows, strict=True):
        row["chosen"] = setting == choice.chosen
        row["loss_increase_bound"] = choice.increases[setting].bound if setting in choice.increases else None
    return rows


def _profile(loaded: Loaded, choice: Choice, limit: float, text: Mapping[str, Any], documents: int) -> Profile:
    model, chosen = loaded[0], choice.chosen
    assert chosen is not None
    found = choice.increases[chosen]
    return Profile(
        grid=times_of(model.config, chosen),
        solver=chosen.solver,
        evaluations=evaluations_of(model.config, chosen),
        max_loss_increase=limit,
        loss_increase=found.value,
        loss_increase_bound=found.bound,
        text=text["source"],
        tokens=text["tokens"],
        documents=documents,
        fingerprint=profiles.fingerprint_of(model),
    )


def _told(profile: Profile) -> str:
    """Returns a sentence about what was chosen."""
    units = f"{profile.documents} documents not searched" if profile.documents else "rows not searched"
    return (
        f"chosen: {profile.steps} steps of {profile.solver}, {profile.evaluations} evaluations; on {units} "
        f"the loss changes by {profile.loss_increase:+.2%}, at 95 % confidence by at most "
        f"{profile.loss_increase_bound:+.2%}, of the {percent(profile.max_loss_increase)} allowed"
    )


def _unreachable(config: ModelConfig, choice: Choice, limit: float) -> str:
    """Returns the message for a limit that no candidate keeps."""
    if choice.closest is None:
        return "no way to cross the depth in fewer evaluations has a finite loss: the model needs its full depth"
    found, needed = choice.increases[choice.closest], choice.needed
    allow = f"allow --max_loss_increase={math.ceil(1e4 * needed) / 100:.6g}%, or " if needed < 1 else ""
    return (
        f"the tolerance is unreachable: no way to cross the depth in fewer than {config.depth} evaluations is known to "
        f"keep the loss within {percent(limit)} of full depth; the smallest increase found is {found.value:+.3%}, at "
        f"most {found.bound:+.3%} at 95 % confidence, with {evaluations_of(config, choice.closest)} evaluations: "
        f"{allow}give more text (--text, --eval_batches)"
    )
