"""Tokens decoded by kernels: all in one launch that stays on the chip, or a launch for every phase of every step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.attend import attend, send_for_memory
from odelm.models.kernels.choice import choose, drain_readout, read_out, send_for_readout, settle
from odelm.models.kernels.layout import Layout
from odelm.models.kernels.phases import moved, phases_of
from odelm.models.kernels.program import Program, Ref, Token, exchanged, scratch
from odelm.models.kernels.rounded import read_out_rounded

plgpu: Any = mosaic_gpu
Arrays = dict[str, jax.Array]
PROFILED = 450
"""Begins and ends that a trace has room for."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Begin:
    """Where a text begins to be continued; int32 () each."""

    token: jax.Array
    """The newest token, which is not in the memory yet."""
    position: jax.Array
    """Its position."""
    place: jax.Array
    """Where its key and value go in the memory: behind all others."""
    count: jax.Array
    """How many tokens to generate at most."""
    end: jax.Array
    """The token after which to stop; -1 is none."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of a layout; `interpret` is `plgpu.InterpretGPUParams()` to run them without a GPU."""

    layout: Layout
    interpret: Any = None
    profile: str = ""
    """A folder for traces of each launch, Chrome's JSON, in cycles."""

    def make(self, run: Callable[..., None], *, programs: int | None = None) -> Callable[..., None]:
        """Returns a kernel that calls `run(program, numbers, *refs)`, of arguments (refs of `Program`, numbers, *refs).

        The programs do not meet if their number is given.
        """
        layout, meeting = self.layout, programs is None

        def body(matrices: Any, vectors: Any, memory: Any, between: Any, numbers: Ref, *refs: Any) -> None:
            *given, _, near = refs
            me = lax.axis_index("program")
            run(Program(layout, me, matrices, vectors, between, memory[0], memory[1], near, meeting), numbers, *given)

        out = jax.ShapeDtypeStruct((1,), jnp.int32)  # a kernel must have one
        options = {} if self.interpret is None else {"interpret": self.interpret}
        if self.profile:
            options["compiler_params"] = plgpu.CompilerParams(profile_space=PROFILED, profile_dir=self.profile)
        kernel = plgpu.kernel(
            body, out_type=out, scratch_types=[scratch(layout)], grid=(programs or layout.programs,),
            grid_names=("program",), **options,
        )  # fmt: skip
        return lambda *refs: (kernel(*refs), None)[1]


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
    """Returns the tokens after a text, int32 (limit,), their log-probabilities, float32 (limit,), and how
    many there are, int32 (); what stands behind these is not set.

    Args:
        matrices: those of `odelm.models.kernels.tables`, for the layout of the kernels.
        vectors: as there, and `hidden`, float32 (S,), what is added to the scores of each place of the memory: 0, or
            `attend.LEAST` at one not to be attended to. Those from `begin.place` on are not seen before they are
            filled. If the layout is `sampled`, also `temperature`, float32 (1,), and `keys`, uint32 (limit, 2), the
            data of the key by which each token is drawn; if it is `filtered`, `top_k`, int32 (1,).
        memory: references (`jax.new_ref`) of keys and values (N, S, J K) in the layout's dtype, with finite numbers
            everywhere; they are written to.
        limit: the most tokens that there may be.
        persistent: whether one launch computes all; its programs wait for each other and must all run at once.
            Otherwise each phase is a launch.
    """
    # XLA would fill arrays of one number anew for every token.
    vectors = lax.optimization_barrier(vectors)
    between = jax.tree.map(jax.new_ref, begin_exchange(kernels.layout, marked=kernels.layout.marked and persistent))
    results = jax.new_ref(jnp.zeros(limit, jnp.int32)), jax.new_ref(jnp.zeros(limit, jnp.float32))
    refs = matrices, vectors, memory, between
    if persistent:
        numbers = jnp.stack([begin.token, begin.position, begin.place, begin.count, begin.end]).astype(jnp.int32)
        made = jax.new_ref(jnp.zeros(1, jnp.int32))
        kernels.make(_all_tokens)(*refs, numbers, *results, made)
        count = jax.freeze(made)[0]
    else:
        count = _launches(kernels, refs, begin, results)
    tokens, logprobs = (jax.freeze(ref) for ref in results)
    return tokens, logprobs, count


def begin_exchange(layout: Layout, *, marked: bool) -> Arrays:
    """Returns the arrays that `exchanged` describes, with zeros. Programs read only what the same launch wrote, except
    the count of arrivals, the units that fill up the last slice of the hidden ones, and marks: 0 is that of no step."""
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
            tokens[done], logprobs[done] = word, logprob

        return done + 1, word, met

    program.begin()
    send_for_readout(program, early=True)
    done, _, _ = lax.while_loop(going, one, (jnp.int32(0), first, jnp.int32(0)))
    program.end()
    drain_readout(program)

    @pl.when(program.me == 0)
    def count_tokens() -> None:
        made[0] = done


def _compute(program: Program, token: Token, met: jax.Array) -> jax.Array:
    """Computes all phases of a token, up to the choice of the next, and returns how often programs have arrived."""
    layout, last = program.layout, program.layout.steps - 1
    phases = phases_of(layout)

    def step(number: jax.Array, met: jax.Array) -> jax.Array:
        for phase, names in phases.items():
            here = program.with_opaque_numbers()
            with jax.named_scope(phase.__name__.strip("_")):
                phase(here, token, number)
            if not program.marked:
                program.arrive(here.has(*names))
            if not names:
                pl.when(number < last)(lambda: send_for_memory(program, token, number + 1))
            if "down" in names:
                pl.when(number == last)(lambda: send_for_readout(program, early=False))
            if not program.marked:
                met = met + layout.participants(*names)
                program.wait(met)
        return met

    send_for_memory(program, token, jnp.int32(0))
    met = lax.fori_loop(0, layout.steps, step, met)
    with jax.named_scope("read_out"):
        affine = program.affine("end")
        read_out_of(layout)(program, moved(program, token, jnp.int32(last)), affine, token.number)
    program.arrive(jnp.bool(True))
    program.begin_token()
    send_for_readout(program, early=True)
    met = met + layout.programs
    program.wait(met)
    return met


def read_out_of(layout: Layout) -> Callable[..., None]:
    """Returns the readout of a layout."""
    return read_out_rounded if layout.rounded else read_out


def _launches(kernels: Kernels, refs: Any, begin: Begin, results: tuple[Ref, Ref]) -> jax.Array:
    """Decodes by a launch for each phase, and returns how many tokens there are."""
    layout, word = kernels.layout, jax.new_ref(begin.token.reshape(1))
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
        word[0], tokens[numbers[2]], logprobs[numbers[2]] = found, found, logprob

    launches = [phase_kernel(phase, step) for step in range(layout.steps) for phase in phases_of(layout)]
    readout = kernels.make(run_readout, programs=layout.programs)
    choice = kernels.make(run_choice, programs=1)

    def going(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        done, ended = carry
        return (done < begin.count) & ~ended

    def one(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done, _ = carry
        numbers = jnp.stack([begin.position + done, begin.place + done, done]).astype(jnp.int32)
        for launch in launches:
            launch(*refs, numbers, word)
        readout(*refs, numbers, word)
        choice(*refs, numbers, word, *results)
        return done + 1, word[0] == begin.end

    done, _ = lax.while_loop(going, one, (jnp.int32(0), jnp.bool(False)))
    return done
