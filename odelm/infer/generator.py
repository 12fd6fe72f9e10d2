"""Continues texts from one checkpoint at any depth: `odelm.Generator`."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from odelm import ode
from odelm.arguments import whole
from odelm.infer import prompts as prompts_
from odelm.infer.continuation import Continuation, read_rows, with_texts
from odelm.infer.decode import Decoding, advance, prefill
from odelm.infer.drafts import DraftCounts, Drafting, Speculating, check_no_drafts, make_drafting, spare_places
from odelm.infer.kernel_choice import ByKernel, Choice
from odelm.infer.prompts import Prompts
from odelm.infer.room import bytes_a_place, check_generation
from odelm.infer.runner import Runner, check_model, with_options
from odelm.infer.sampling import Sampling, sampling_key, sampling_options
from odelm.infer.speculate import speculate, start_speculating
from odelm.infer.stopping import stop_strings
from odelm.infer.together import check_together
from odelm.models import CausalLM
from odelm.models.early_exit import EarlyExit
from odelm.models.transformer import DepthPlan, Grid
from odelm.tokenizer import checked, end_id, find_id

CHUNK = 16
"""Tokens between two checks of the text, for stop strings and streams."""
NO_END = -1
"""The id in place of an end token if there is none."""
State = Decoding | Speculating


class Generator:
    """Continues prompts with a decoder, keeping the keys and values of earlier positions.

    A prompt is a string, or a list of token ids. Programs are compiled for lengths of powers of two, so that few
    programs serve all; prompts of unequal lengths share one.

    Args:
        steps, grid, solver: how the depth is crossed, as in `model.plan`. If none is given, `model.profile` decides;
            full depth if there is no profile, or if a draft, early exits or another `kv_span` is given.
        dtype: of matrix products, "float32", "bfloat16" or "float16"; the model's own by default.
        prefill_steps, prefill_grid: how prompts cross the depth, if differently; the memory of one grid is then read at
            the times of the other (`odelm.models.retime`).
        draft_steps, draft_grid: coarse steps that draft tokens; those of `steps` or `grid` verify them, so that the
            text is that of the verifying steps (`odelm.infer.speculate`).
        draft_length, draft_confidence: the maximum number of tokens in a draft, 4 by default, and the probability of
            the likeliest token below which a draft ends, 0 by default (`odelm.infer.drafts.Drafting`).
        early_exit: when a new token leaves those steps early, as in `odelm.EarlyExit`; prompts take all steps. The
            tokens of a batch wait for the last one to leave.
        kv_span: units of depth over which keys and values are shared, in place of the model's own `model.kv_span`.
        window: how many positions each token sees, its own included: texts may then be longer than the model's
            positions, in a memory of the prompts and the window (`odelm.models.memory.Memory`). Prompts may not.
        kernel: what decodes: "persistent", "launches" or "xla"; "auto" takes the fastest that supports the case
            (`odelm.infer.kernel_choice`).
        end_token: the token that ends a text; by default the usual one of the tokenizer.

    Parameters on a mesh stay there; inside `jax.set_mesh(mesh)` the rows are distributed over its devices too.
    `draft_counts` counts the drafted and the accepted tokens of the last call.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None = None,
        *,
        steps: int | None = None,
        grid: Grid | None = None,
        solver: ode.Solver | None = None,
        dtype: str | None = None,
        prefill_steps: int | None = None,
        prefill_grid: Grid | None = None,
        draft_steps: int | None = None,
        draft_grid: Grid | None = None,
        draft_length: int | None = None,
        draft_confidence: float | None = None,
        early_exit: EarlyExit | None = None,
        kv_span: int | None = None,
        window: int | None = None,
        kernel: str = "auto",
        end_token: str = "",
    ):
        check_model(model, "decoder")
        runner = Runner.of(with_options(model, dtype=dtype, kv_span=kv_span))
        drafts = draft_steps is not None or draft_grid is not None
        otherwise = drafts or early_exit is not None or runner.model.config.kv_span != model.config.kv_span
        if model.profile is not None and steps is None and grid is None and solver is None and not otherwise:
            grid, solver = model.profile.grid, model.profile.solver
        solver = solver or "euler"
        plan = runner.model.plan(steps=steps, grid=grid, solver=solver)
        before = drafting = None
        if prefill_steps is not None or prefill_grid is not None:
            before = runner.model.plan(steps=prefill_steps, grid=prefill_grid, solver=solver)
        if drafts:
            coarse = runner.model.plan(steps=draft_steps, grid=draft_grid)
            drafting = make_drafting(coarse, draft_length, draft_confidence)
        else:
            check_no_drafts(draft_length=draft_length, draft_confidence=draft_confidence)
        self._set(runner, tokenizer, plan, before, drafting, early_exit, window, kernel, end_token)

    @classmethod
    def of(
        cls,
        runner: Runner,
        tokenizer: Tokenizer | None,
        plan: DepthPlan,
        *,
        prefill_plan: DepthPlan | None = None,
        drafting: Drafting | None = None,
        early_exit: EarlyExit | None = None,
        window: int | None = None,
        kernel: str = "auto",
        end_token: str = "",
    ) -> "Generator":
        """Returns a generator for a model that is already prepared as a `Runner`, and for plans of that model."""
        generator = cls.__new__(cls)
        generator._set(runner, tokenizer, plan, prefill_plan, drafting, early_exit, window, kernel, end_token)
        return generator

    def _set(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        plan: DepthPlan,
        prefill_plan: DepthPlan | None,
        drafting: Drafting | None,
        early_exit: EarlyExit | None,
        window: int | None,
        kernel: str,
        end_token: str,
    ) -> None:
        check_together(
            runner.model, plan, prefill_plan=prefill_plan, drafting=drafting, early_exit=early_exit, window=window
        )
        self.runner, self.tokenizer, self.plan = runner, checked(tokenizer), plan
        self.prefill_plan, self.drafting, self.early_exit, self.window = prefill_plan, drafting, early_exit, window
        self.draft_counts: DraftCounts | None = None
        self.kernels = ByKernel(kernel, drafts=drafting is not None)
        found = None if tokenizer is None else end_id(tokenizer, end_token) if end_token else find_id(tokenizer, "end")
        self.end = NO_END if found is None else found

    def __call__(self, prompts: Prompts, **options: Any) -> list[Any]:
        """Returns only the continuation of each prompt, as text, or as ids if the generator has no tokenizer.

        With `logprobs=True` each is a `Continuation`. The other options are those of `stream`.
        """
        logprobs = options.pop("logprobs", False)
        *_, found = self.stream(prompts, **options)
        if logprobs:
            return found
        return [one.tokens if one.text is None else one.text for one in found]

    def stream(
        self,
        prompts: Prompts,
        *,
        new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        every: int | None = None,
    ) -> Iterator[list[Continuation]]:
        """Yields the continuations so far, each time after `every` more tokens, and finally the finished ones.

        They end before the end token, before the first of the strings `stop` (only the text; `tokens` may have up to
        `every` more), or after `new_tokens` tokens. An unfinished text omits an ending that may begin a stop string or
        is part of a character, so that it only grows. `temperature` 0 takes the most likely token; `top_k`, `top_p`,
        `min_p` and `repetition_penalty` are as in `odelm.infer.sampling.Sampling`. When the first item is requested, it
        raises InputError for a prompt without tokens, for more tokens than the model's positions, and for an option out
        of its range.
        """
        config = self.runner.model.config
        given = prompts_.read(prompts, self.tokenizer, config)
        sampling = sampling_options(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        key = sampling_key(seed)
        new_tokens = whole("new_tokens", new_tokens)
        stop = stop_strings(stop, has_tokenizer=self.tokenizer is not None)
        every = (CHUNK if stop else new_tokens) if every is None else whole("every", every)
        state = self.begin(given, new_tokens, sampling, key, penalised=repetition_penalty != 1)
        until = 0
        while True:
            until = min(until + every, new_tokens)
            state = self._advance(state, sampling, jnp.int32(until))
            if isinstance(state, Speculating):
                self.draft_counts = DraftCounts.of(state, new_tokens)
            found, done = self._read(given, state, stop, new_tokens, last=until == new_tokens)
            yield found
            if until == new_tokens or done.all():
                return
            state = dataclasses.replace(state, done=jnp.asarray(done))

    def begin(
        self, given: list[list[int]], new_tokens: int, sampling: Sampling, key: jax.Array, *, penalised: bool = False
    ) -> State:
        """Returns the state after prompts of token ids, with the first token of each and room for `new_tokens`.

        Raises InputError for more tokens than the model's positions, and for memories that do not fit on the devices.
        """
        prompts_.check_room(given, new_tokens, self.runner.model.config, self.window)
        longest = max(map(len, given))
        width, room = self.sizes(longest, new_tokens)
        rows, lengths = prompts_.padded(given, width)
        check_generation(self, len(given), longest, new_tokens)
        options = dict(new_tokens=room, end=self.end, penalised=penalised)
        of_prompts = rows, lengths, sampling, key
        graph, params, plan = self.runner.graph, self.runner.params, self.plan
        if self.drafting is not None:
            return _start_speculating(graph, params, plan, self.drafting, *of_prompts, **options)
        options |= dict(prefill_plan=self.prefill_plan, early_exit=self.early_exit, window=self.window)
        return _prefill(graph, params, plan, *of_prompts, **options)

    @property
    def kernel_choice(self) -> Choice:
        """What decoded the last call."""
        return self.kernels.choice

    def memory_bytes(self, batch: int, longest: int, new_tokens: int) -> int:
        """Returns the bytes of the keys and values of `batch` rows, for prompts up to `longest` tokens and the new
        tokens."""
        places = self.places(whole("longest", longest), whole("new_tokens", new_tokens))
        return whole("batch", batch) * places * self.place_bytes[1]

    def places(self, longest: int, new_tokens: int) -> int:
        """Returns how many positions a memory has room for."""
        width, room = self.sizes(longest, new_tokens)
        if self.window is not None:
            return width + min(room - 1, self.window)
        return width + room + (-1 if self.drafting is None else spare_places(self.drafting.length))

    def sizes(self, longest: int, new_tokens: int) -> tuple[int, int]:
        """Returns the padded length of prompts, and the room for new tokens (`odelm.infer.prompts.sizes`)."""
        return prompts_.sizes(longest, new_tokens, self.runner.model.config.max_length, self.window)

    @cached_property
    def place_bytes(self) -> tuple[int, int]:
        """The bytes that a position of a row takes while the prompts are read, and afterwards."""
        plans = [self.prefill_plan or self.plan, self.plan, *([self.drafting.plan] if self.drafting else [])]
        first, *later = (bytes_a_place(self.runner.model, plan, self.window) for plan in plans)
        return first, sum(later)

    def _advance(self, state: State, sampling: Sampling, until: jax.Array) -> State:
        """Returns the state with `until` tokens in each row."""
        graph, params, plan = self.runner.graph, self.runner.params, self.plan
        if isinstance(state, Decoding):
            kernels, given = self.kernels, (self.runner, plan, state, sampling)
            if kernels.choose(*given, early_exit=self.early_exit is not None):
                if (found := kernels.advance(*given, until, end=self.end)) is not None:
                    return found
            return _advance(graph, params, plan, state, sampling, until, end=self.end, early_exit=self.early_exit)
        return _speculate(graph, params, plan, self.drafting, state, sampling, until, end=self.end)

    def _read(
        self, given: list[list[int]], state: State, stop: Sequence[str], limit: int, *, last: bool
    ) -> tuple[list[Continuation], np.ndarray]:
        """Returns the continuations, and which of them have ended."""
        counts = np.asarray(state.count if isinstance(state, Decoding) else state.counts)
        counts = np.minimum(np.broadcast_to(counts, len(given)), limit)
        evaluations = None if isinstance(state, Speculating) else state.evaluations
        found = read_rows(state.tokens, state.logprobs, evaluations, counts, end=self.end)
        ended = np.array(state.done) | (counts >= limit)
        if self.tokenizer is None:
            return found, ended
        return with_texts(found, given, self.tokenizer, ended, stop, last=last)


@partial(jax.jit, static_argnums=0, static_argnames=("new_tokens", "end", "penalised", "window"))
def _prefill(graph: nnx.GraphDef, params: Any, *arguments: Any, **options: Any) -> Decoding:
    return prefill(nnx.merge(graph, params), *arguments, **options)


@partial(jax.jit, static_argnums=0, static_argnames="end", donate_argnums=3)
def _advance(
    graph: nnx.GraphDef, params: Any, plan: DepthPlan, state: Decoding, *arguments: Any, **options: Any
) -> Decoding:
    """Returns the result of `advance`, and reuses the memory of `state`."""
    return advance(nnx.merge(graph, params), plan, state, *arguments, **options)


@partial(jax.jit, static_argnums=0, static_argnames=("new_tokens", "end", "penalised"))
def _start_speculating(graph: nnx.GraphDef, params: Any, *arguments: Any, **options: Any) -> Speculating:
    return start_speculating(nnx.merge(graph, params), *arguments, **options)


@partial(jax.jit, static_argnums=0, static_argnames="end", donate_argnums=4)
def _speculate(
    graph: nnx.GraphDef, params: Any, plan: DepthPlan, drafting: Any, state: Any, *arguments: Any, end: int
) -> Speculating:
    """Returns the result of `speculate`, and reuses the memories of `state`."""
    return speculate(nnx.merge(graph, params), plan, drafting, state, *arguments, end=end)
