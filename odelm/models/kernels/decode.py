"""Tokens decoded by kernels: all in one launch that stays on the chip, or a launch for every phase of every step."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from odelm.models.kernels.arrays import exchanged
from odelm.models.kernels.choice import drain_readout, send_for_readout, settle
from odelm.models.kernels.choice_rows import all_ended, choose_rows, read_out_rows
from odelm.models.kernels.chunks import load_memory_ahead, send_for_memory
from odelm.models.kernels.kernel import Begin, Kernels
from odelm.models.kernels.launches import by_launches, by_launches_of_rows, read_out_of
from odelm.models.kernels.layout import Layout
from odelm.models.kernels.multiply import begin_copies
from odelm.models.kernels.phases import gather_last, moved, phases_of
from odelm.models.kernels.portions import participants
from odelm.models.kernels.program import Program, Ref
from odelm.models.kernels.tokens import Token, Tokens

Arrays = dict[str, jax.Array]


def decode(
    kernels: Kernels,
    matrices: Arrays,
    vectors: Arrays,
    memory: tuple[Ref, Ref],
    begin: Begin,
    *,
    limit: int,
    persistent: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the tokens after each text, int32 (B, limit), their log-probabilities, float32 (B, limit), and how
    many there are, int32 (); entries after these are not set. Tokens of a row that has ended are `begin.end`, until
    all have ended.

    Args:
        matrices: those of `odelm.models.kernels.tables`, for the layout of the kernels.
        vectors: as there, and `hidden`, float32 (B, S), which is added to the scores of each place of the memory: 0, or
            `attend.LEAST` at one not to be attended to. Places from `begin.place` on are not attended to before they
            are filled. If the layout is `sampled`, also `temperature`, float32 (1,), and `keys`, uint32 (limit, 2), the
            data of the key by which each token is drawn; if it is `filtered`, `top_k`, int32 (1,).
        memory: references (`jax.new_ref`) of keys and values (N, B, S, J K) in the layout's dtype, with finite numbers
            everywhere; they are written to.
        limit: the most tokens that can be generated.
        persistent: whether one launch computes all phases; its programs wait for each other and must all run at once.
            Otherwise each phase is a launch.
    """
    # XLA would fill arrays of one number anew for every token.
    vectors = lax.optimization_barrier(vectors)
    between = jax.tree.map(jax.new_ref, begin_exchange(kernels.layout, marked=kernels.layout.marked and persistent))
    between["texts"] = jax.new_ref(begin.texts())
    shape = kernels.layout.rows, limit
    results = jax.new_ref(jnp.zeros(shape, jnp.int32)), jax.new_ref(jnp.zeros(shape, jnp.float32))
    refs = matrices, vectors, memory, between
    if persistent:
        numbers = [begin.token[0], begin.position[0], begin.place[0], begin.count, begin.end]
        made = jax.new_ref(jnp.zeros(1, jnp.int32))
        run = _all_tokens_of_rows if kernels.layout.several else _all_tokens
        kernels.make(run)(*refs, jnp.stack(numbers).astype(jnp.int32), *results, made)
        count = jax.freeze(made)[0]
    elif kernels.layout.several:
        count = by_launches_of_rows(kernels, refs, begin, results)
    else:
        count = by_launches(kernels, refs, begin, results)
    tokens, logprobs = (jax.freeze(ref) for ref in results)
    return tokens, logprobs, count


def begin_exchange(layout: Layout, *, marked: bool) -> Arrays:
    """Returns the arrays that `exchanged` describes, with zeros. Programs read only what the same launch wrote, except
    the count of arrivals, the hidden units that fill up the last slice, and marks: 0 marks no step."""
    return {name: jnp.zeros(of.shape, of.dtype) for name, of in exchanged(layout, marked=marked).items()}


def _all_tokens(program: Program, numbers: Ref, tokens: Ref, logprobs: Ref, made: Ref) -> None:
    first, position, place, count, end = (numbers[i] for i in range(5))

    def going(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        done, word, _ = carry
        return (done < count) & ((done == 0) | (word != end))

    def one(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        done, word, met = carry
        met = _compute(program, Token(word, position + done, place + done, done), met)
        with jax.named_scope("choose"):
            word, logprob, met = settle(program, done, met)

        @pl.when(program.me == 0)
        def keep() -> None:
            tokens[0, done], logprobs[0, done] = word, logprob

        return done + 1, word, met

    begin_copies(program)
    send_for_readout(program, early=True)
    done, _, _ = lax.while_loop(going, one, (jnp.int32(0), first, jnp.int32(0)))
    _finish(program, done, made)


def _all_tokens_of_rows(program: Program, numbers: Ref, tokens: Ref, logprobs: Ref, made: Ref) -> None:
    count, end = numbers[3], numbers[4]

    def going(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        done, ended, _ = carry
        return (done < count) & ~ended

    def one(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        done, _, met = carry
        token = Tokens(program.between["texts"], done)
        met = _compute(program, token, met, end)
        with jax.named_scope("choose"):
            choose_rows(program, token, end, tokens, logprobs)
            met = program.meet(met)
        return done + 1, all_ended(program), met

    begin_copies(program)
    send_for_readout(program, early=True)
    done, _, _ = lax.while_loop(going, one, (jnp.int32(0), all_ended(program), jnp.int32(0)))
    _finish(program, done, made)


def _finish(program: Program, done: jax.Array, made: Ref) -> None:
    """Waits for copies that are still running, and writes how many tokens there are."""
    program.pieces.drain()
    drain_readout(program)

    @pl.when(program.me == 0)
    def count_tokens() -> None:
        made[0] = done


def _compute(program: Program, token: Token | Tokens, met: jax.Array, end: jax.Array | None = None) -> jax.Array:
    """Computes all phases of a token, up to the choice of the next, and returns how often programs have arrived; with
    several rows, those that have ended get the token `end`."""
    layout, last = program.layout, program.layout.steps - 1
    phases = phases_of(layout)

    def behind(names: tuple[str, ...], met: jax.Array) -> jax.Array:
        if program.marked:
            return met
        program.wait(met + participants(layout, *names))
        return met + participants(layout, *names)

    def step(number: jax.Array, met: jax.Array) -> jax.Array:
        for place, (phase, names) in enumerate(phases.items()):
            here = program.with_opaque_numbers()
            with jax.named_scope(phase.__name__.strip("_")):
                phase(here, token, number)
            if not program.marked:
                program.arrive(here.has(*names))
            if place == 0:
                load_memory_ahead(here, token, number)
            if not names:
                pl.when(number < last)(lambda: send_for_memory(program, token, number + 1))
            if "down" in names:
                pl.when(number == last)(lambda: send_for_readout(program, early=False))
            met = behind(names, met)
        return met

    send_for_memory(program, token, jnp.int32(0))
    met = lax.fori_loop(0, layout.steps, step, met)
    with jax.named_scope("read_out"):
        if isinstance(token, Tokens):
            assert end is not None
            gather_last(program, token)
            if not program.marked:
                program.arrive(program.has("rows"))
            met = behind(("rows",), met)
            read_out_rows(program, token, end)
        else:
            affine = program.affine("end")
            read_out_of(layout)(program, moved(program, token, jnp.int32(last)), affine, token.number)
    program.arrive(jnp.bool(True))
    program.pieces.fetch_for_token()
    send_for_readout(program, early=True)
    met = met + layout.programs
    program.wait(met)
    return met
