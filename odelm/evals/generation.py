"""Ways to generate text from one model, timed side by side, each with its held-out loss against full depth."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from odelm import rng
from odelm.errors import InputError
from odelm.infer import prompts
from odelm.infer.drafts import make_drafting
from odelm.infer.generator import Generator
from odelm.infer.latency import Latency, measure
from odelm.infer.runner import Runner, with_options
from odelm.infer.sampling import Sampling
from odelm.models.early_exit import EarlyExit, counts_that_save
from odelm.models.exit_pass import encode_with_exits
from odelm.models.inputs import Inputs
from odelm.models.loss import Batch, LossSums, mean_loss, sums_from_hidden
from odelm.models.retime import retimed
from odelm.models.stretches import evaluations_of
from odelm.models.transformer import DepthPlan

Row = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to generate."""

    steps: int
    """Steps over the core for each new token; with a draft, those of the pass that verifies it."""
    prefill_steps: int | None = None
    """Steps of the prompt, if different."""
    draft_steps: int | None = None
    draft_length: int = 4
    early_exit: EarlyExit | None = None
    """When a token leaves the steps early."""
    kv_span: int | None = None
    """Units of depth that share keys and values, if different from the model's own."""

    @property
    def label(self) -> str:
        if self.kv_span is not None:
            return f"{self.steps}, span {self.kv_span}"
        if self.early_exit is not None:
            return f"{self.steps}, exit {self.early_exit.tolerance:g}"
        if self.draft_steps is not None:
            return f"draft {self.draft_steps} x {self.draft_length}"
        return str(self.steps) if self.prefill_steps is None else f"{self.prefill_steps}, then {self.steps}"


def ways(
    runner: Runner,
    steps: Sequence[int],
    *,
    solver: str = "euler",
    prefill_steps: int | None = None,
    drafts: Sequence[tuple[int, int]] = (),
    early_exits: Sequence[EarlyExit] = (),
    kv_spans: Sequence[int] = (),
) -> list[Way]:
    """Returns what to measure, full depth first; InputError for what the model cannot take.

    Args:
        prefill_steps: also measures prompts in this number of steps, with new tokens in each of `steps`.
        drafts: pairs of a count of coarse steps and the length of the drafts that they make, which full depth verifies.
        early_exits: also measures full depth and each of `steps` with these early exits, where an exit can save steps.
        kv_spans: also measures keys and values shared over these units of depth, at the steps where the sharing differs
            from that of the model's own `kv_span`.
    """
    full = runner.model.config.core
    found = [Way(full), *(Way(count) for count in sorted(set(steps), reverse=True) if count != full)]
    own = runner.model.config.kv_span
    spans = [(way.steps, span) for way in found for span in kv_spans if span != own]
    spanning = [Way(steps, kv_span=span) for steps, span in spans if full < max(span, own) * steps]
    saving = counts_that_save(runner.model.config, [way.steps for way in found]) if early_exits else []
    leaving = [Way(count, early_exit=rule) for count in saving for rule in early_exits]
    if prefill_steps is not None:
        found += [Way(way.steps, prefill_steps) for way in found if way.steps != prefill_steps]
    found += [Way(full, None, count, length) for count, length in drafts]
    found += spanning + leaving
    for way in found:
        make_generator(runner, way, solver)
    return found


def make_generator(runner: Runner, way: Way, solver: str = "euler", kernel: str = "auto") -> Generator:
    """Returns the generator of a way, which ignores end tokens and uses a kernel where one supports that way."""
    if way.kv_span is not None:
        runner = Runner.of(with_options(runner.model, kv_span=way.kv_span))
    plan = runner.plan(way.steps, solver if way.draft_steps is None else "euler")
    before = None if way.prefill_steps is None else runner.plan(way.prefill_steps, solver)
    drafting = None
    if way.draft_steps is not None:
        drafting = make_drafting(runner.plan(way.draft_steps, "euler"), way.draft_length)
    if way.draft_steps is not None or way.early_exit is not None or way.kv_span is not None:
        kernel = "auto"
    rule = way.early_exit
    return Generator.of(runner, None, plan, prefill_plan=before, drafting=drafting, early_exit=rule, kernel=kernel)


def compare_ways(
    runner: Runner,
    chosen: Sequence[Way],
    given: list[list[int]],
    *,
    new_tokens: int,
    held_out: Sequence[Batch] = (),
    solver: str = "euler",
    repeats: int = 5,
    kernel: str = "auto",
) -> list[Row]:
    """Returns a row for each way; the first is the one that the others are compared with.

    Every way continues the prompts `given` (token ids) greedily by `new_tokens`. `token_ms`, and any value derived from
    it, is None where a text took no longer than its prompt. `compile_s` is how much longer the first call took than a
    later one: ways of one structure share programs, so that only the first of these ways includes compilation. Losses
    are of the second half of each held-out sequence: the first half crosses the depth as a prompt does, the second as
    new tokens do. `held_out` may be empty.
    """
    if new_tokens < 2:
        raise InputError(f"new_tokens is {new_tokens}, expected at least 2: the first comes with the prompt")
    prompts.check_room(given, new_tokens, runner.model.config)
    generators = [make_generator(runner, way, solver, kernel) for way in chosen]
    texts, seconds = [], []
    for generator in generators:
        start = time.perf_counter()
        texts.append(generator(given, new_tokens=new_tokens, logprobs=True))
        seconds.append(time.perf_counter() - start)
    calls = {("prompt", i): lambda g=g: _start(g, given, new_tokens) for i, g in enumerate(generators)}
    calls |= {("text", i): lambda g=g: g(given, new_tokens=new_tokens) for i, g in enumerate(generators)}
    latencies = measure(calls, repeats=repeats, warmup=1)
    rows = []
    for i, (way, generator) in enumerate(zip(chosen, generators, strict=True)):
        row = _row(way, generator, given, new_tokens, latencies["prompt", i], latencies["text", i])
        row["solver"] = solver if way.draft_steps is None else "euler"
        row["compile_s"] = max(seconds[i] - latencies["text", i].median / 1e3, 0.0)
        row["identical"] = float(np.mean([a.tokens == b.tokens for a, b in zip(texts[i], texts[0], strict=True)]))
        # The first token of each text is from its prompt, which takes all steps.
        spent = [count for text in texts[i] for count in (text.evaluations or [])[1:]]
        row["text_evaluations"] = float(np.mean(spent)) if spent else None
        rows.append(row | _loss(generator, held_out))
    full = rows[0]
    for row in rows:
        timed = full["token_ms"] is not None and row["token_ms"] is not None
        row["speedup"] = full["token_ms"] / row["token_ms"] if timed else None
        row["loss_increase"] = row["loss"] / full["loss"] - 1 if held_out else None
    return rows


def _start(generator: Generator, given: list[list[int]], new_tokens: int) -> Any:
    """Returns the state after the prompts, once it is computed."""
    return jax.block_until_ready(generator.begin(given, new_tokens, Sampling(), rng.key(0, "sample")))


def token_ms(text: float, prompt: float, new_tokens: int) -> float | None:
    """Returns the milliseconds of each token except the first, which comes with the prompt, given the milliseconds of a
    text and of its prompt; None if the text took no longer, so that the difference is meaningless."""
    return (text - prompt) / (new_tokens - 1) if text > prompt else None


def _row(
    way: Way, generator: Generator, given: list[list[int]], new_tokens: int, prompt: Latency, text: Latency
) -> Row:
    token = token_ms(text.median, prompt.median, new_tokens)
    counts = generator.draft_counts
    return {
        "label": way.label,
        "steps": way.steps,
        "prefill_steps": way.prefill_steps or way.steps,
        "draft_steps": way.draft_steps,
        "draft_length": way.draft_length if way.draft_steps is not None else None,
        "kv_span": generator.runner.model.config.kv_span,
        "own_kv_span": way.kv_span is None,
        "early_exit": None if way.early_exit is None else way.early_exit.tolerance,
        "exit_measure": None if way.early_exit is None else way.early_exit.measure,
        "kernel": generator.kernel_choice.kernel,
        "kernel_reason": generator.kernel_choice.reason,
        "batch": len(given),
        "prompt": max(map(len, given)),
        "new_tokens": new_tokens,
        "prefill_ms": prompt.median,
        "token_ms": token,
        "text_ms": {"median": text.median, "p90": text.p90},
        "tokens_per_s": None if token is None else len(given) / token * 1e3,
        "memory_bytes": generator.memory_bytes(len(given), max(map(len, given)), new_tokens),
        "tokens_per_round": None if counts is None else counts.tokens_per_round,
        "accepted": None if counts is None else counts.accepted / max(counts.drafted, 1),
    }


def _loss(generator: Generator, held_out: Sequence[Batch]) -> Row:
    """Returns the loss of second halves given first halves over the held-out batches, and its standard error."""
    if not held_out:
        return {"loss": None, "loss_stderr": None, "loss_tokens": 0, "evaluations": None}
    runner, plan = generator.runner, generator.plan
    before = plan if generator.prefill_plan is None else generator.prefill_plan

    @jax.jit
    def losses(params: Any, before: DepthPlan, plan: DepthPlan, rule: EarlyExit | None, data: Batch) -> Any:
        model = nnx.merge(runner.graph, params)
        if rule is not None:
            return second_half_with_exits(model, plan, rule, data)
        return second_half(model, before, plan, data), jnp.float32(evaluations_of(plan))

    rule = generator.early_exit
    sums = [jax.device_get(losses(runner.params, before, plan, rule, dict(data))) for data in held_out]
    found = mean_loss(of for of, _ in sums)
    spent = sum(mean * of.tokens for of, mean in sums) / found.tokens
    return {
        "loss": found.loss,
        "loss_stderr": found.stderr,
        "loss_tokens": found.tokens,
        "evaluations": None if generator.drafting is not None else float(spent),
    }


def second_half(model: Any, before: DepthPlan, plan: DepthPlan, data: Batch) -> Any:
    """Returns the summed loss of the second half of each row, whose first half crossed the depth by another plan."""
    B, L = data["tokens"].shape
    half = L // 2
    first, second = ({name: array[:, part] for name, array in data.items()} for part in (slice(half), slice(half, L)))
    memory = model.memory(before, batch=B, room=half)
    _, memory = model.run(_inputs(first), before, memory=memory)
    memory = retimed(model, memory, before, plan).widened(L - half)
    hidden, _ = model.run(_inputs(second), plan, memory=memory)
    return sums_from_hidden(model, hidden, second)


def second_half_with_exits(model: Any, plan: DepthPlan, rule: EarlyExit, data: Batch) -> tuple[LossSums, jax.Array]:
    """Returns the summed loss of the second half of each row, whose tokens leave the plan early, and the mean of their
    evaluations over the predicted ones, float32 ()."""
    B, L = data["tokens"].shape
    half = L // 2
    fine = np.broadcast_to(np.arange(L) < half, (B, L))
    hidden, evaluations = encode_with_exits(model, _inputs(data), plan, rule, by="token", fine=fine)
    second = {name: array[:, half:] for name, array in data.items()}
    weights = jnp.asarray(second["weights"])
    mean = (evaluations[:, half:] * weights).sum() / jnp.maximum(weights.sum(), 1)
    return sums_from_hidden(model, hidden[:, half:], second), mean


def _inputs(data: Batch) -> Inputs:
    return Inputs(data["tokens"], **{name: data.get(name) for name in ("mask", "segments")})
