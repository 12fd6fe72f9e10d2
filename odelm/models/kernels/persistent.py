"""One kernel that decodes many tokens: every step of the depth, the readout and the choice of the next token."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from odelm.models.kernels.attend import attend
from odelm.models.kernels.layout import Layout
from odelm.models.kernels.likeliest import choose, read_out, send_for_readout
from odelm.models.kernels.phases import enter, feed, leave_attention, leave_feedforward, moved
from odelm.models.kernels.program import Program, Ref, exchanged, scratch

Carry = tuple[jax.Array, jax.Array, jax.Array]
"""How many tokens there are, the newest of them, and how often the programs have met; int32 ()."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Begin:
    """Where a kernel begins; int32 () each."""

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


def decode(
    layout: Layout,
    matrices: dict[str, jax.Array],
    vectors: dict[str, jax.Array],
    keys: Ref,
    values: Ref,
    hidden: jax.Array,
    begin: Begin,
    *,
    limit: int,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the likeliest tokens after a text, int32 (limit,), their log-probabilities, float32 (limit,), and how
    many there are, int32 (); what stands behind these is not set.

    Args:
        matrices, vectors: those of `odelm.models.kernels.tables`, for this layout.
        keys, values: references (`jax.new_ref`) of a memory (N, S, J K) in the layout's dtype, with finite numbers
            everywhere; they are written to.
        hidden: float32 (S,), what is added to the scores of each place: 0, or `LEAST` at one not to be attended to.
            Those from `begin.place` on are not seen before they are filled.
        limit: the most tokens that there may be.
        interpret: `plgpu.InterpretGPUParams()` runs a layout of one program without a GPU.
    """

    def body(matrices: Any, vectors: Any, keys: Ref, values: Ref, begin: Ref, *refs: Any) -> None:
        tokens, logprobs, made, between, near = refs
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR) if layout.programs > 1 else None
        program = Program(layout, lax.axis_index("program"), matrices, vectors, between, keys, values, near, arrived)
        _run(program, begin, (tokens, logprobs, made))

    shape = jax.ShapeDtypeStruct
    results = shape((limit,), jnp.int32), shape((limit,), jnp.float32), shape((1,), jnp.int32)
    out = (*results, exchanged(layout))
    interpreted = {} if interpret is None else {"interpret": interpret}
    kernel = plgpu.kernel(
        lambda *refs: body(*refs), out_type=out, scratch_types=[scratch(layout)], grid=(layout.programs,),
        grid_names=("program",), **interpreted,
    )  # fmt: skip
    numbers = jnp.stack([begin.token, begin.position, begin.place, begin.count, begin.end]).astype(jnp.int32)
    tokens, logprobs, made, _ = kernel(matrices, vectors | {"hidden": hidden}, keys, values, numbers)
    return tokens, logprobs, made[0]


def _run(program: Program, begin: Ref, results: tuple[Ref, Ref, Ref]) -> None:
    first, position, place, count, end = (begin[i] for i in range(5))
    tokens, logprobs, made = results

    def going(carry: Carry) -> jax.Array:
        done, token, _ = carry
        return (done < count) & ((done == 0) | (token != end))

    def one(carry: Carry) -> Carry:
        done, token, met = carry
        token, logprob, met = _next(program, token, (position + done, place + done), met)

        @pl.when(program.me == 0)
        def keep_token() -> None:
            tokens[done], logprobs[done] = token, logprob

        return done + 1, token, met

    for name in ("qkv", "out"):
        program.fetch(name, jnp.int32(0))
    done, _, _ = lax.while_loop(going, one, (jnp.int32(0), first, jnp.int32(0)))
    program.wait_for_pieces()

    @pl.when(program.me == 0)
    def count_tokens() -> None:
        made[0] = done


def _next(
    program: Program, token: jax.Array, at: tuple[jax.Array, jax.Array], met: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the token after one `at` a position and place, its log-probability, and how often programs have met."""
    p = program

    def embedded() -> jax.Array:
        return p.matrices["embedding"][token] + p.vectors["position"][at[0]]

    def step(number: jax.Array, met: jax.Array) -> jax.Array:
        enter(p, embedded, number)
        met = p.meet(met)
        attend(p, at, number)
        met = p.meet(met)
        leave_attention(p, number)
        met = p.meet(met)
        feed(p, number)
        met = p.meet(met)
        leave_feedforward(p, number)
        pl.when(number == p.layout.steps - 1)(lambda: send_for_readout(p))
        return p.meet(met)

    met = lax.fori_loop(0, p.layout.steps, step, met)
    read_out(p, moved(p, jnp.int32(p.layout.steps - 1)))
    met = p.meet(met)
    word, logprob = choose(p)
    return word, logprob, met
