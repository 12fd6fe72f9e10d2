"""Tokens decoded by a launch for every phase of every step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from odelm.models.kernels.attend import attend
from odelm.models.kernels.choice import choose, read_out, send_for_readout
from odelm.models.kernels.choice_rows import choose_rows, read_out_rows
from odelm.models.kernels.chunks import send_for_memory
from odelm.models.kernels.kernel import Begin, Kernels
from odelm.models.kernels.layout import Layout
from odelm.models.kernels.phases import gather_last, moved, phases_of
from odelm.models.kernels.program import Program, Ref
from odelm.models.kernels.rounded import read_out_rounded
from odelm.models.kernels.tokens import TEXTS, Token, Tokens


def read_out_of(layout: Layout) -> Callable[..., None]:
    """Returns the readout of a layout."""
    return read_out_rounded if layout.rounded else read_out


def by_launches(kernels: Kernels, refs: Any, begin: Begin, results: tuple[Ref, Ref]) -> jax.Array:
    """Decodes by a launch for each phase, and returns how many tokens there are."""
    layout, word = kernels.layout, jax.new_ref(begin.token)
    assert not layout.filtered, "how many launches a token takes would depend on it"

    def phase_kernel(phase: Any, step: int) -> Callable[..., None]:
        def run(program: Program, numbers: Ref, word: Ref) -> None:
            token = Token(word[0], numbers[0], numbers[1], numbers[2])
            if phase is attend:
                send_for_memory(program, token, jnp.int32(step))
            phase(program, token, jnp.int32(step))

        return kernels.make(run, programs=layout.programs)

    def run_readout(program: Program, numbers: Ref, word: Ref) -> None:
        token = Token(word[0], numbers[0], numbers[1], numbers[2])
        send_for_readout(program, early=True)
        send_for_readout(program, early=False)
        affine = program.affine("end")
        state = moved(program, token, jnp.int32(layout.steps - 1))
        read_out_of(layout)(program, state, affine, numbers[2])

    def run_choice(program: Program, numbers: Ref, word: Ref, tokens: Ref, logprobs: Ref) -> None:
        found, _, logprob = choose(program, numbers[2])
        word[0], tokens[0, numbers[2]], logprobs[0, numbers[2]] = found, found, logprob

    launches = [phase_kernel(phase, step) for step in range(layout.steps) for phase in phases_of(layout)]
    readout = kernels.make(run_readout, programs=layout.programs)
    choice = kernels.make(run_choice, programs=1)

    def going(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        done, ended = carry
        return (done < begin.count) & ~ended

    def one(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done, _ = carry
        numbers = jnp.stack([begin.position[0] + done, begin.place[0] + done, done]).astype(jnp.int32)
        for launch in launches:
            launch(*refs, numbers, word)
        readout(*refs, numbers, word)
        choice(*refs, numbers, word, *results)
        return done + 1, word[0] == begin.end

    done, _ = lax.while_loop(going, one, (jnp.int32(0), jnp.bool(False)))
    return done


def by_launches_of_rows(kernels: Kernels, refs: Any, begin: Begin, results: tuple[Ref, Ref]) -> jax.Array:
    """Decodes several rows by a launch for each phase, and returns how many tokens there are."""
    layout, texts = kernels.layout, refs[-1]["texts"]

    def phase_kernel(phase: Any, step: int) -> Callable[..., None]:
        def run(program: Program, numbers: Ref) -> None:
            token = Tokens(program.between["texts"], numbers[0])
            if phase is attend:
                send_for_memory(program, token, jnp.int32(step))
            phase(program, token, jnp.int32(step))

        return kernels.make(run, programs=layout.programs)

    def run_gather(program: Program, numbers: Ref) -> None:
        gather_last(program, Tokens(program.between["texts"], numbers[0]))

    def run_readout(program: Program, numbers: Ref) -> None:
        send_for_readout(program, early=True)
        send_for_readout(program, early=False)
        read_out_rows(program, Tokens(program.between["texts"], numbers[0]), numbers[1])

    def run_choice(program: Program, numbers: Ref, tokens: Ref, logprobs: Ref) -> None:
        choose_rows(program, Tokens(program.between["texts"], numbers[0]), numbers[1], tokens, logprobs)

    launches = [phase_kernel(phase, step) for step in range(layout.steps) for phase in phases_of(layout)]
    launches += [kernels.make(run, programs=layout.programs) for run in (run_gather, run_readout)]
    choice = kernels.make(run_choice, programs=layout.programs)

    def going(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        done, ended = carry
        return (done < begin.count) & ~ended

    def one(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done, _ = carry
        numbers = jnp.stack([done, begin.end]).astype(jnp.int32)
        for launch in launches:
            launch(*refs, numbers)
        choice(*refs, numbers, *results)
        return done + 1, texts[TEXTS.index("done"), : layout.rows].all()

    done, _ = lax.while_loop(going, one, (jnp.int32(0), begin.done.all()))
    return done
