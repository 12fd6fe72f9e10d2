"""What a kernel that stays on a GPU cannot do faster: barriers, exchanges between its programs, products, copies.

    python -m benchmarks.kernel_floors --out=floors.json

Each line is the time of one round inside a kernel of so many rounds, all programs taking part, one on each
multiprocessor: the difference between a long and a short launch, divided by the rounds between them, so that a launch
itself costs nothing. The median of `--repeats` and the smallest and largest. Needs a Hopper card and jax 0.11.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from benchmarks import run_program
from benchmarks.options import whole
from odelm.models.kernels.signals import arrive, wait

plgpu: Any = mosaic_gpu
PROGRAMS, CLUSTER = 132, 8
SHORT, LONG = 200, 2200
"""Rounds of the two launches."""
Kernel = tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]
"""A kernel, and what it takes."""


def barrier(rounds: int, *, scope: str = "sys") -> Kernel:
    """All programs meet: one counter, which each adds to and reads until it is full."""

    def body(counter: Any, out: Any) -> None:
        meet = _meeting(scope, counter)
        lax.fori_loop(0, rounds, lambda i, _: meet(i), None)
        _finish(out)

    return _kernel(body), [jax.ShapeDtypeStruct((1,), jnp.int32)]


def barrier_by_cluster(rounds: int, *, leaders: bool = True) -> Kernel:
    """The programs of a cluster meet, then the first of each cluster with those of the others, then the cluster."""
    clusters = PROGRAMS // CLUSTER

    def body(counter: Any, out: Any, local: Any) -> None:
        del counter
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)
        first = lax.axis_index("rank") == 0

        def within() -> None:
            plgpu.commit_smem()  # one thread arrives for all: without it a slow one might miss two phases, and wait on
            plgpu.barrier_arrive(local)
            plgpu.barrier_wait(local)

        def meet(i: jax.Array, _: None) -> None:
            within()
            if leaders:

                @pl.when(first)
                def lead() -> None:
                    pl.semaphore_signal(arrived, 1)
                    pl.semaphore_wait(arrived, (i + 1) * clusters, decrement=False)

                within()

        lax.fori_loop(0, rounds, meet, None)
        _finish(out)

    scratch = [plgpu.ClusterBarrier(collective_axes=("rank",))]
    return _clusters(body, scratch), [jax.ShapeDtypeStruct((1,), jnp.int32)]


def broadcast(rounds: int, *, numbers: int, scope: str = "sys") -> Kernel:
    """One program after the other writes so many float32, all meet, and all read them."""

    def body(counter: Any, out: Any, shared: Any) -> None:
        meet = _meeting(scope, counter)
        me = lax.axis_index("program")

        def one(i: jax.Array, x: jax.Array) -> jax.Array:
            place = lax.rem(i, 2)
            pl.when(me == lax.rem(i, PROGRAMS))(lambda: shared.at[place].__setitem__(..., x))
            meet(i)
            return shared[place] * 0.5

        x = lax.fori_loop(0, rounds, one, jnp.ones((numbers,), jnp.float32))
        out[...] = jnp.broadcast_to(jnp.max(x), (128,))

    kernel = _kernel(body, more=[jax.ShapeDtypeStruct((2, numbers), jnp.float32)])
    return kernel, [jax.ShapeDtypeStruct((1,), jnp.int32)]


def exchange(rounds: int) -> Kernel:
    """Every program of a cluster sends (64, 8) float32 to all of it, and adds up what it is sent."""

    def body(counter: Any, out: Any, parts: Any, arrival: Any, local: Any) -> None:
        del counter
        rank = lax.axis_index("rank")

        def one(i: jax.Array, x: jax.Array) -> jax.Array:
            place, x = lax.rem(i, 2), plgpu.layout_cast(x, plgpu.Layout.WGMMA)

            @pl.loop(0, CLUSTER)
            def send(peer: jax.Array) -> None:
                plgpu.async_store_smem(
                    x, parts.at[place, rank], arrival.at[place], cluster_idx=peer, cluster_dim="rank"
                )

            plgpu.barrier_wait(arrival.at[place])
            found = [plgpu.layout_cast(parts[place, k], plgpu.Layout.WGMMA) for k in range(CLUSTER)]
            return reduce(add, found) * 0.1

        start = plgpu.layout_cast(jnp.full((64, 8), 1.0, jnp.float32), plgpu.Layout.WGMMA)
        x = lax.fori_loop(0, rounds, one, start)
        plgpu.commit_smem()
        plgpu.barrier_arrive(local)  # no program may end while another writes to it
        plgpu.barrier_wait(local)
        out[...] = jnp.broadcast_to(jnp.max(jnp.max(x, axis=1)), (128,))

    scratch = [
        plgpu.SMEM((2, CLUSTER, 64, 8), jnp.float32),
        plgpu.Barrier(num_arrivals=CLUSTER, num_barriers=2),
        plgpu.ClusterBarrier(collective_axes=("rank",)),
    ]
    return _clusters(body, scratch), [jax.ShapeDtypeStruct((1,), jnp.int32)]


def product(rounds: int, *, inputs: int = 512, columns: int = 8, sums: int = 1, in_registers: bool = False) -> Kernel:
    """A product of (64, inputs) by (inputs, columns) in bfloat16, both in shared memory, or the first brought into
    registers by 128 inputs; as several `sums`, over every other 64 inputs, that do not wait for each other."""

    def body(counter: Any, x: Any, w: Any, out: Any, matrix: Any, right: Any, arrival: Any) -> None:
        del counter
        plgpu.copy_gmem_to_smem(w, matrix, arrival)
        column = plgpu.load(x, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        turned = right.transpose((1, 0))
        turned[...] = lax.broadcast_in_dim(column.astype(jnp.bfloat16), (inputs, columns), (0,))
        plgpu.commit_smem()
        plgpu.barrier_wait(arrival)

        def one(_: jax.Array, x: jax.Array) -> jax.Array:
            def summed(*accs: Any) -> jax.Array:
                for i in range(inputs // 128 if in_registers else 0):
                    here = pl.ds(128 * i, 128)
                    left = plgpu.load(matrix.at[:, here], layout=plgpu.Layout.WGMMA)
                    plgpu.wgmma(accs[0], left, right.at[:, here].transpose((1, 0)))
                if sums == 1 and not in_registers:
                    plgpu.wgmma(accs[0], matrix, right.transpose((1, 0)))
                for i in range(inputs // 64 if sums > 1 else 0):
                    here = pl.ds(64 * i, 64)
                    plgpu.wgmma(accs[i % sums], matrix.at[:, here], right.at[:, here].transpose((1, 0)))
                return reduce(add, [acc[...] for acc in accs])

            accs = [plgpu.ACC((64, columns), jnp.float32)] * sums
            return x + jnp.max(jnp.max(pl.run_scoped(summed, *accs), axis=1))

        out[...] = jnp.broadcast_to(lax.fori_loop(0, rounds, one, jnp.float32(0)), (128,))

    shape = jax.ShapeDtypeStruct
    scratch = [plgpu.SMEM((64, inputs), jnp.bfloat16), plgpu.SMEM((columns, inputs), jnp.bfloat16), plgpu.Barrier()]
    shapes = [shape((1,), jnp.int32), shape((inputs,), jnp.float32), shape((64, inputs), jnp.bfloat16)]
    return _kernel(body, scratch=scratch), shapes


def product_by_warps(rounds: int, *, inputs: int) -> Kernel:
    """A product of (64, inputs) by one vector by `mma.sync` (`odelm.models.kernels.by_warps`), which writes the vector
    first, as `product` does not."""
    from odelm.models.kernels.by_warps import product, put_pairs
    from odelm.models.kernels.marked import strided

    def body(counter: Any, x: Any, w: Any, out: Any, matrix: Any, pairs: Any, arrival: Any) -> None:
        del counter
        plgpu.copy_gmem_to_smem(w, matrix, arrival)
        start = plgpu.load(x, layout=strided(inputs), optimized=False)
        plgpu.barrier_wait(arrival)

        def one(_: jax.Array, x: jax.Array) -> jax.Array:
            put_pairs(x, pairs, strided(inputs))
            return x + jnp.max(product([matrix], pairs, inputs))

        x = lax.fori_loop(0, rounds, one, start)
        out[...] = jnp.broadcast_to(jnp.max(x), (128,))

    shape = jax.ShapeDtypeStruct
    scratch = [plgpu.SMEM((64, inputs), jnp.bfloat16), plgpu.SMEM((inputs // 2,), jnp.int32), plgpu.Barrier()]
    shapes = [shape((1,), jnp.int32), shape((inputs,), jnp.float32), shape((64, inputs), jnp.bfloat16)]
    return _kernel(body, scratch=scratch), shapes


def copy(rounds: int, *, rows: int, inputs: int, ring: int) -> Kernel:
    """Every program copies (64, inputs) bfloat16 of its own into shared memory, `ring` of them on their way; the whole
    has so many `rows`."""
    tiles = rows // 64

    def body(counter: Any, matrix: Any, out: Any, pieces: Any, arrival: Any) -> None:
        del counter
        me = lax.axis_index("program")

        def fetch(i: jax.Array) -> None:
            tile, slot = lax.rem(i * PROGRAMS + me, tiles), lax.rem(i, ring)
            plgpu.copy_gmem_to_smem(matrix.at[pl.ds(tile * 64, 64)], pieces.at[slot], arrival.at[slot])

        for i in range(ring):
            fetch(jnp.int32(i))

        def one(i: jax.Array, _: None) -> None:
            plgpu.barrier_wait(arrival.at[lax.rem(i, ring)])
            pl.when(i + ring < rounds)(lambda: fetch(i + ring))

        lax.fori_loop(0, rounds, one, None)
        _finish(out)

    scratch = [plgpu.SMEM((ring, 64, inputs), jnp.bfloat16), plgpu.Barrier(num_barriers=ring)]
    shapes = [jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16)]
    return _kernel(body, scratch=scratch), shapes


CASES: dict[str, Callable[[int], Kernel]] = {
    "barrier, system scope": barrier,
    "barrier, GPU scope": lambda n: barrier(n, scope="gpu"),
    "barrier of a cluster of 8": lambda n: barrier_by_cluster(n, leaders=False),
    "barrier by cluster and leader": barrier_by_cluster,
    "broadcast of 1.5 KB": lambda n: broadcast(n, numbers=384),
    "broadcast of 1.5 KB, GPU scope": lambda n: broadcast(n, numbers=384, scope="gpu"),
    "broadcast of 48 KB, GPU scope": lambda n: broadcast(n, numbers=12288, scope="gpu"),
    "exchange of 64x8 in a cluster of 8": exchange,
    "product 64x512 by 512x8": product,
    "product 64x768 by 768x8": lambda n: product(n, inputs=768),
    "product 64x768 by 768x8 from registers": lambda n: product(n, inputs=768, in_registers=True),
    "product 64x768 by 768x8 in two sums": lambda n: product(n, inputs=768, sums=2),
    "product 64x768 by 768x8 in four sums": lambda n: product(n, inputs=768, sums=4),
    "product 64x768 by 768 by warps, vector written": lambda n: product_by_warps(n, inputs=768),
    "copy of 32 KB a program, 4.3 MB in all (L2)": lambda n: copy(n, rows=132 * 64, inputs=256, ring=4),
    "copy of 32 KB a program, 26 MB in all (L2)": lambda n: copy(n, rows=6 * 132 * 64, inputs=256, ring=4),
    "copy of 32 KB a program, 432 MB in all (memory)": lambda n: copy(n, rows=100 * 132 * 64, inputs=256, ring=4),
    "copy of 16 KB a program, 432 MB in all (memory)": lambda n: copy(n, rows=200 * 132 * 64, inputs=128, ring=5),
}


def _meeting(scope: str, counter: Any) -> Callable[..., None]:
    """Returns what lets all programs meet, for the i-th time."""
    if scope == "gpu":
        return lambda i, _=None: (arrive(counter), wait(counter, (i + 1) * PROGRAMS))[1]
    arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)

    def meet(i: jax.Array, _: None = None) -> None:
        pl.semaphore_signal(arrived, 1)
        pl.semaphore_wait(arrived, (i + 1) * PROGRAMS, decrement=False)

    return meet


def _finish(out: Any) -> None:
    out[...] = jnp.zeros((128,), jnp.float32)


OUT = jax.ShapeDtypeStruct((128,), jnp.float32)


def _kernel(body: Callable[..., None], *, scratch: list[Any] | None = None, more: list[Any] | None = None) -> Any:
    out = [OUT, *(more or [])]
    return _counted(plgpu.kernel(body, out_type=out, scratch_types=scratch or [], grid=(PROGRAMS,), grid_names=_NAMES))


def _clusters(body: Callable[..., None], scratch: list[Any]) -> Any:
    clusters = dict(cluster=(CLUSTER,), cluster_names=("rank",), grid=(PROGRAMS // CLUSTER,), grid_names=_NAMES)
    return _counted(plgpu.kernel(body, out_type=[OUT], scratch_types=scratch, **clusters))


_NAMES = ("program",)


def _counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the kernel with its counter as a reference that it may add to."""

    def call(counter: jax.Array, *arrays: jax.Array) -> Any:
        return kernel(jax.new_ref(counter), *arrays)[0]

    return call


def seconds_a_round(make: Callable[[int], Kernel], repeats: int) -> list[float]:
    """Returns the time of one round, once for each repeat."""
    calls = {}
    for rounds in (SHORT, LONG):
        kernel, shapes = make(rounds)
        arrays = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
        calls[rounds] = (jax.jit(kernel), arrays)
        jax.block_until_ready(calls[rounds][0](*arrays))
    found = []
    for _ in range(repeats):
        times = {}
        for rounds, (call, arrays) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(*arrays))
            times[rounds] = time.perf_counter() - start
        found.append((times[LONG] - times[SHORT]) / (LONG - SHORT))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=whole, default=11)
    parser.add_argument("--cases", default="", help="only those whose names contain this")
    parser.add_argument("--out", type=Path, help="where to write the times as JSON")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {PROGRAMS} programs", flush=True)
    results = {}
    for name, make in CASES.items():
        if options.cases not in name:
            continue
        found = sorted(seconds_a_round(make, options.repeats))
        results[name] = found
        middle = statistics.median(found)
        print(f"  {name:50} {middle * 1e6:8.3f} us ({found[0] * 1e6:.3f} to {found[-1] * 1e6:.3f})", flush=True)
        if options.out:
            options.out.write_text(json.dumps({"seconds": results}) + "\n")


if __name__ == "__main__":
    run_program(main)
