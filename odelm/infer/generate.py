"""Continues a text: by `Generator`, or, for a plan that keeps no memory, by reading all of it again for each token."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from odelm.errors import InputError
from odelm.infer import prompts
from odelm.infer.drafts import Drafting
from odelm.infer.generator import Generator
from odelm.infer.runner import Runner, check_model
from odelm.infer.sampling import sampling_key, sampling_options
from odelm.models.early_exit import EarlyExit
from odelm.models.transformer import DepthPlan
from odelm.tokenizer import decode_after, end_id, find_id


def continue_text(
    runner: Runner,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    plan: DepthPlan,
    new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    end_token: str = "",
    prefill_plan: DepthPlan | None = None,
    drafting: Drafting | None = None,
    early_exit: EarlyExit | None = None,
    window: int | None = None,
    kernel: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Returns `prompt` with a sampled continuation, which ends before the tokenizer's end token; see `generate`.

    `end_token` is as in `config.data.end_token`; if the tokenizer has no such token, no text ends early.
    `prefill_plan`, `drafting`, `early_exit`, `window` and `kernel` are as in `Generator.of`; they need a plan that
    keeps a memory; InputError otherwise. On a GPU, or if a kernel is requested, `say` is called with a line that names
    what decoded the text.
    """
    if runner.model.config.kind == "decoder" and all(part.solver is None for part in plan):
        generator = Generator.of(
            runner, tokenizer, plan,
            prefill_plan=prefill_plan, drafting=drafting, early_exit=early_exit, window=window, kernel=kernel,
            end_token=end_token,
        )  # fmt: skip
        options = dict(new_tokens=new_tokens, temperature=temperature, top_k=top_k, seed=seed)
        text = prompt + generator([prompt], **options)[0]
        if kernel != "auto" or jax.default_backend() == "gpu":
            say(f"decoded by {generator.kernel_choice}")
        return text
    if not (prefill_plan is drafting is early_exit is window is None and kernel in ("auto", "xla")):
        raise InputError("a memory needs integrator='scan': Diffrax evaluates the block where it chooses to")
    (given,) = prompts.read([prompt], tokenizer, runner.model.config)
    tokens = generate(
        runner,
        given,
        plan=plan,
        new_tokens=new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        end=end_id(tokenizer, end_token) if end_token else find_id(tokenizer, "end"),
    )
    return prompt + decode_after(tokenizer, given, tokens)


def generate(
    runner: Runner,
    prompt: list[int],
    *,
    plan: DepthPlan,
    new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    end: int | None = None,
) -> list[int]:
    """Returns the sampled continuation of `prompt`, up to but without the token `end`; keeps no memory.

    Each token is drawn from the `top_k` most likely (0: from all) after dividing the logits by `temperature`; 0 takes
    the most likely. Raises InputError for an encoder, an empty prompt, more tokens than the model's positions, or an
    option out of its range.
    """
    config = runner.model.config
    check_model(runner.model, "decoder")
    if not prompt:
        raise InputError("the prompt has no tokens: give at least one character")
    sampling, key = sampling_options(temperature=temperature, top_k=top_k), sampling_key(seed)
    prompts.check_room([prompt], new_tokens, config)
    buffer = jnp.zeros((1, len(prompt) + new_tokens), jnp.int32).at[0, : len(prompt)].set(jnp.asarray(prompt))
    sampled = _sample(
        runner.graph,
        runner.params,
        plan,
        buffer,
        len(prompt),
        key,
        sampling.temperature,
        min(top_k or config.vocab_size, config.vocab_size),
    )
    continuation = sampled[0, len(prompt) :].tolist()
    return continuation[: continuation.index(end)] if end in continuation else continuation


@partial(jax.jit, static_argnames=("graph", "top_k"))
def _sample(
    graph: nnx.GraphDef,
    params: Any,
    plan: DepthPlan,
    buffer: jax.Array,
    start: int | jax.Array,
    key: jax.Array,
    temperature: float | jax.Array,
    top_k: int,
) -> jax.Array:
    """Fills the buffer (1, L) from position `start` on."""
    model = nnx.merge(graph, params)

    def fill(position: jax.Array, tokens: jax.Array) -> jax.Array:
        hidden = model.encode(tokens, plan=plan)
        logits, choices = jax.lax.top_k(model.readout(hidden[0, position - 1]), top_k)
        noise = jax.random.gumbel(jax.random.fold_in(key, position), logits.shape)
        chosen = choices[jnp.argmax(logits + temperature * noise)]
        return tokens.at[0, position].set(chosen)

    return jax.lax.fori_loop(start, buffer.shape[1], fill, buffer)
