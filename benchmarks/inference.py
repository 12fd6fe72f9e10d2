"""Inference against `transformers` under torch.compile, on one GPU: a token of a decoder, or a pass of an encoder.

    python -m benchmarks.inference --kind=decode --shape=small,medium --size=1x128,32x128
    python -m benchmarks.inference --kind=decode --size=1x512 --parallel --kernel=persistent,xla --parts=1,4
    python -m benchmarks.inference --kind=encode --shape=base,large --size=1x128,8x128,32x512

Both sides compute in bfloat16 with random weights, a process each. Those of `transformers` compile together, and wait;
odelm compiles alone, because XLA chooses kernels by timing them; then they are timed in turns, `--rounds` times, while
all others wait. A size is a batch and a length. A decoder continues prompts of that length greedily by as many tokens,
with a memory: the time of a token is that of all but the first, which comes with the prompt. `transformers` has GPT-2's
block and a static cache, once by `generate` and once by a loop written for it, which replays CUDA graphs; odelm has its
default block, or one of `--parallel` branches, at full depth and at `--parts` of its steps, decoded by each `--kernel`.
An encoder is ALBERT's on both sides, from tokens to the last hidden states, padding allowed for.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import run_program
from benchmarks.inference_peers import transformers_encode, transformers_generate, transformers_loop
from benchmarks.options import Size, one_of, several, size, whole, written
from benchmarks.timing import ENCODER_WORDS, ENCODERS, Measure, Times, median_seconds
from benchmarks.training import SHAPES, VOCABULARY

ANSWER = "answer: "
"""Begins a line of a side that is for the process which asked."""


def odelm_decode(options: argparse.Namespace) -> Measure:
    import numpy as np
    from flax import nnx

    import odelm

    shape, length = SHAPES[options.shape], options.length
    config = odelm.ModelConfig(
        kind="decoder", vocab_size=VOCABULARY, width=shape["width"], heads=shape["heads"], depth=shape["depth"],
        max_length=1024, dtype="bfloat16", parallel_branches=options.parallel,
    )  # fmt: skip
    model = odelm.CausalLM(config, rngs=nnx.Rngs(0))
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (options.batch, length)).tolist()
    generators = {
        f"{n} steps, {kernel}": odelm.Generator(model, steps=n, kernel=kernel)
        for n in _counts(shape["depth"], options)
        for kernel in options.kernel.split(",")
    }
    if options.quantize:
        small = odelm.quantize(model, options.quantize)
        for n in (shape["depth"], shape["depth"] // 4):
            generators[f"{n} steps, {options.quantize}"] = odelm.Generator(small, steps=n)

    def text(generator: odelm.Generator, count: int, repeats: int) -> float:
        return median_seconds(lambda: generator(prompts, new_tokens=count), lambda: None, repeats)

    def measure(repeats: int = options.repeats) -> Times:
        return {
            label: (text(one, length, repeats) - text(one, 1, repeats)) / (length - 1)
            for label, one in generators.items()
        }

    measure(1)
    return measure


def odelm_encode(options: argparse.Namespace) -> Measure:
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    import odelm
    from odelm.infer import on_gpu
    from odelm.infer.runner import Runner
    from odelm.models import Inputs

    shape = ENCODERS[options.shape]
    recipe = odelm.load_recipe("encoder_base").model
    config = dataclasses.replace(recipe, **shape, time_modulation=False, dtype="bfloat16", vocab_size=ENCODER_WORDS)
    runner = Runner.of(odelm.create(config, rngs=nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(0), (options.batch, options.length), 0, ENCODER_WORDS)
    lengths = jnp.full(options.batch, options.length, jnp.int32)

    @partial(on_gpu.BySize, texts=2)
    def encode(params: Any, plan: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """As `odelm.EncoderRunner` does, without what it makes of the hidden states."""
        model, plan = on_gpu.ready_to_read(nnx.merge(runner.graph, params), plan, tokens.size)
        return model.encode(Inputs(tokens, lengths=lengths), plan=plan)

    plans = {f"{steps} steps": runner.plan(steps, "euler") for steps in _counts(shape["depth"], options)}

    def measure(repeats: int = options.repeats) -> Times:
        def read(plan: Any) -> None:
            encode(runner.params, plan, tokens, lengths).block_until_ready()

        return {label: median_seconds(partial(read, plan), lambda: None, repeats) for label, plan in plans.items()}

    measure(1)
    return measure


def _counts(depth: int, options: argparse.Namespace) -> list[int]:
    return [depth // part for part in options.parts]


ODELM = "odelm"
SIDES: dict[str, dict[str, Callable[[argparse.Namespace], Measure]]] = {
    "decode": {"generate": transformers_generate, "loop": transformers_loop, ODELM: odelm_decode},
    "encode": {
        "compile": partial(transformers_encode, label="torch.compile", mode="default"),
        "graphs": partial(transformers_encode, label="with CUDA graphs", mode="reduce-overhead"),
        ODELM: odelm_encode,
    },
}


class Side:
    """A process that compiles one side of one case, and is timed when it is asked."""

    def __init__(self, name: str, options: argparse.Namespace, shape: str, size: Size):
        self.name = name
        given = {"kind": options.kind, "shape": shape, "batch": size.first, "length": size.second}
        given |= {"side": name, "repeats": options.repeats, "quantize": options.quantize, "parts": options.parts}
        given |= {"kernel": options.kernel}
        flags = [f"--{key}={written(value)}" for key, value in given.items()]
        command = [sys.executable, "-m", "benchmarks.inference", *flags]
        command += ["--parallel"] if options.parallel else []
        # The card is shared by processes of which one works at a time.
        shared = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=shared)

    def ready(self) -> bool:
        """Waits until it has compiled; returns whether it could."""
        return self._answer() is not None

    def times(self) -> Times:
        """Returns what it measures now; nothing if it has failed."""
        try:
            self._process.stdin.write("measure\n")  # pyright: ignore[reportOptionalMemberAccess]
            self._process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
        except OSError:
            return {}
        return self._answer() or {}

    def end(self) -> None:
        self._process.communicate()

    def _answer(self) -> Times | None:
        for line in self._process.stdout:  # pyright: ignore[reportOptionalIterable]
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        return None


def answer(options: argparse.Namespace) -> None:
    """What the process of a side does: compiles, says so, and measures for each line that it is given."""
    measure = SIDES[options.kind][options.side](options)
    print(ANSWER + "{}", flush=True)
    for _ in sys.stdin:
        print(ANSWER + json.dumps(measure()), flush=True)


def compared(options: argparse.Namespace) -> dict[str, Times]:
    """Returns the medians of the times of both sides, by case and label."""
    names = [name for name in SIDES[options.kind] if name != ODELM]
    cases = list(itertools.product(options.shapes, options.size))
    peers = {case: [Side(name, options, *case) for name in names] for case in cases}
    for one in itertools.chain(*peers.values()):
        if not one.ready():
            print(f"transformers: {one.name} failed", flush=True)
    results = {}
    for case in cases:
        ours = Side(ODELM, options, *case)
        if not ours.ready():
            print(f"odelm, {' '.join(map(str, case))}, failed", flush=True)
        found: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for one in (*peers[case], ours):
                for label, seconds in one.times().items():
                    found.setdefault(f"{'odelm' if one is ours else 'transformers'}: {label}", []).append(seconds)
        times = {label: statistics.median(seconds) for label, seconds in found.items()}
        results[" ".join(map(str, case))] = times
        show(f"{options.kind} {' '.join(map(str, case))}, bfloat16, {options.rounds} rounds", times, found)
        for one in (*peers[case], ours):
            one.end()
        if options.out:
            options.out.write_text(json.dumps({"kind": options.kind, "seconds": results}) + "\n")
    return results


def show(title: str, times: Times, all_rounds: dict[str, list[float]]) -> None:
    """Prints each time, its smallest and largest of all rounds, and how many times as fast it is as the peers."""
    peers = {label: seconds for label, seconds in times.items() if label.startswith("transformers")}
    print(title)
    for label, seconds in times.items():
        ratios = "  ".join(f"{peer / seconds:5.2f}x" for peer in peers.values())
        spread = f"{min(all_rounds[label]) * 1e6:.1f} to {max(all_rounds[label]) * 1e6:.1f}"
        print(f"  {label:36} {seconds * 1e6:10.1f} us ({spread})  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("decode", "encode"), default="decode")
    parser.add_argument("--shape", default="small", help="decode: tiny, small, medium; encode: tiny, base, large: A,B")
    parser.add_argument("--size", type=several(size), default="1x128", help="batch x length, several as A,B")
    parser.add_argument("--repeats", type=whole, default=9)
    parser.add_argument("--rounds", type=whole, default=3)
    parser.add_argument(
        "--parts", type=several(whole), default="1,2,3,4", help="odelm takes 1/1, 1/2, ... of its full depth's steps"
    )
    parser.add_argument("--quantize", default="", help="decode: also with matrices of 8 bits, of this kind")
    parser.add_argument("--out", type=Path, help="a file for the seconds, as JSON")
    parser.add_argument("--kernel", default="auto", help="decode: which programs, as of Generator, as A,B")
    parser.add_argument("--parallel", action="store_true", help="decode: parallel branches")
    for name, kind in (("side", str), ("batch", int), ("length", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        options.shapes = several(one_of(SHAPES if options.kind == "decode" else ENCODERS))(options.shape)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --shape: {error}")
    if options.side:
        answer(options)
        return
    compared(options)


if __name__ == "__main__":
    run_program(main)
