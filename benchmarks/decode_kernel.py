"""A token of a decoder by kernels against XLA, on one GPU: time, and how far each is from float32.

    python -m benchmarks.decode_kernel --shape=small --steps=12,3 --context=512
    python -m benchmarks.decode_kernel --model=small-decoder --steps=10,3
    python -m benchmarks.decode_kernel --shape=small --parallel --rows=8 --how=xla,persistent
    python -m benchmarks.decode_kernel --launches=10000

One row, or several together, are continued greedily in bfloat16, by `xla` (`odelm.infer.decode.advance`), by
`launches`, one for each phase of a step, and by the `persistent` kernel, in turns. The time of a token is the
difference between many and one, divided by those between. Afterwards one pass of the model in float32 over what each
has written says how far the logit of each token is below the largest (`below`: 0 where it is the likeliest), and how
far its log-probability is from the one that was reported. `--launches` starts the persistent kernel so often, with
products between some of them, and copies to the card and back beside them. `--profile=FOLDER` traces one launch and
prints the cycles of its parts; `--no-check` leaves out float32. `--compile_for=h200.txt`, a GpuTargetConfigProto of
XLA's as text, only compiles, and needs no GPU (docs/kernels.md).
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import odelm
from benchmarks import run_program
from benchmarks.absent_card import UNTIMED, card_of, shapes_on
from benchmarks.options import numbers_by_name, one_of, several, whole
from benchmarks.training import SHAPES, VOCABULARY
from odelm.config.model import ACTIVATIONS
from odelm.infer.decode import Decoding, advance, prefill
from odelm.infer.in_kernel import advance_in_kernel
from odelm.infer.runner import Runner, with_dtype
from odelm.infer.sampling import sampling_options
from odelm.models.kernels.decode import Kernels
from odelm.models.kernels.layout import Layout
from odelm.models.kernels.layout_choice import layout_of
from odelm.models.kernels.supported import block_bits, unsupported
from odelm.models.kernels.tables import matrices, vectors

HOWS = ("xla", "launches", "persistent")


def model_of(options: argparse.Namespace) -> odelm.CausalLM:
    """Returns the model, in float32: one of random weights of a shape, or one that was trained."""
    if options.model:
        model, *_ = odelm.load(options.model)
        if not isinstance(model, odelm.CausalLM):
            raise odelm.InputError(f"--model={options.model} is no decoder: give one")
        return model
    shape = SHAPES[options.shape]
    width, heads = (options.width, options.width // 64) if options.width else (shape["width"], shape["heads"])
    config = odelm.ModelConfig(
        kind="decoder", vocab_size=VOCABULARY, width=width, heads=heads, depth=shape["depth"], max_length=2048,
        prelude=options.ends, coda=options.ends, parallel_branches=options.parallel, activation=options.activation,
    )  # fmt: skip
    return odelm.CausalLM(config, rngs=nnx.Rngs(0))


class Case:
    """One model and grid: how a prompt is read, and the program of each way to continue it."""

    def __init__(self, model: odelm.CausalLM, steps: int, options: argparse.Namespace):
        self.options, self.steps = options, steps
        self.exact, rounded = with_dtype(model, "float32"), with_dtype(model, "bfloat16")
        if options.quantize:
            self.exact, rounded = (odelm.quantize(one, options.quantize) for one in (self.exact, rounded))
        self.runner = Runner.of(rounded)
        self.plan = self.runner.model.plan(steps=steps)
        if (reason := unsupported(rounded, self.plan)) is not None:
            raise odelm.InputError(f"no kernel decodes this model: {reason}")
        shape = options.rows, options.context
        self.prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, shape).astype(np.int32)
        self.sampling = sampling_options(temperature=options.temperature, top_k=options.top_k)
        room = options.context + options.tokens - 1
        given = dict(sampled=bool(options.temperature), filtered=bool(options.temperature and options.top_k))
        given |= dict(rows=options.rows, block_bits=block_bits(self.runner.model)) | options.layout
        self.layout = layout_of(self.runner.model.config, self.plan, room, **given)
        if not self.layout.fits:
            raise odelm.InputError(f"the kernel takes {self.layout.shared_bytes:,} bytes of shared memory, too many")

    def begin(self, params: Any) -> Decoding:
        """Returns the state after the prompts."""
        B, P = self.prompts.shape
        model, lengths = nnx.merge(self.runner.graph, params), jnp.full(B, P, jnp.int32)
        given = dict(new_tokens=self.options.tokens, end=-1)
        prompts, key = jnp.asarray(self.prompts), jax.random.key(0)
        return prefill(model, self.plan, prompts, lengths, sampling_options(), key, **given)

    def program(self, how: str) -> Any:
        """Returns the jitted `program(params, plan, state, until)`."""

        def run(params: Any, plan: Any, state: Decoding, until: jax.Array) -> Decoding:
            model = nnx.merge(self.runner.graph, params)
            if how == "xla":
                return advance(model, plan, state, self.sampling, until, end=-1)
            layout = self.layout
            kernels = Kernels(layout, profile=self.options.profile if how == "persistent" else "")
            tables = matrices(model, layout), vectors(model, plan, layout)
            return advance_in_kernel(
                tables, state, self.sampling, until, kernels=kernels, end=-1, persistent=how == "persistent"
            )

        return jax.jit(run)

    def differences(self, state: Decoding) -> tuple[float, float]:
        """Returns the largest distance of a written token's logit below the largest, and of its log-probability from
        the one reported, by the model in float32, over all rows."""
        count, P = int(state.count), self.prompts.shape[1]
        found = []
        logits_of = jax.jit(lambda text: self.exact(text, steps=self.steps)[0, P - 1 :])
        for prompt, tokens, logprobs in zip(self.prompts, state.tokens, state.logprobs, strict=True):
            written = np.asarray(tokens[:count])
            with jax.default_matmul_precision("highest"):
                logits = logits_of(jnp.asarray(np.concatenate([prompt, written]))[None, :-1])
            chosen = jnp.take_along_axis(logits, jnp.asarray(written)[:, None], 1)[:, 0]
            error = chosen - jax.nn.logsumexp(logits, axis=-1) - logprobs[:count]
            found.append((float((logits.max(-1) - chosen).max()), float(jnp.abs(error).max())))
        below, errors = zip(*found, strict=True)
        return max(below), max(errors)


def measure(case: Case, hows: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Returns for each way the seconds of a token, and how far it is from float32."""
    params, plan = case.runner.params, case.plan
    state = jax.jit(case.begin)(params)
    programs = {how: case.program(how) for how in hows}
    short, long = jnp.int32(2), jnp.int32(case.options.tokens)
    ends, found = {}, {}
    for how, program in programs.items():
        start = time.perf_counter()
        ends[how] = jax.block_until_ready(program(params, plan, state, long))
        print(f"    {how}: compiled and run in {time.perf_counter() - start:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {how: [] for how in hows}
    for _ in range(repeats):
        for how, program in programs.items():
            times = []
            for until in (short, long):
                start = time.perf_counter()
                jax.block_until_ready(program(params, plan, state, until))
                times.append(time.perf_counter() - start)
            seconds[how].append((times[1] - times[0]) / (int(long) - int(short)))
    for how, end in ends.items():
        below, error = case.differences(end) if case.options.check else (float("nan"), float("nan"))
        found[how] = {"seconds": seconds[how], "below": below, "logprob_error": error}
        times = sorted(1e6 * one for one in seconds[how])
        print(
            f"    {how:12} {statistics.median(times):8.1f} us ({times[0]:.1f} to {times[-1]:.1f}), "
            f"below {below:.4f}, log-probability {error:.4f}", flush=True,
        )  # fmt: skip
    return found


@contextlib.contextmanager
def copies() -> Iterator[None]:
    """Copies arrays to the card and back all the time, on streams of their own, until the context ends."""
    ended, numbers = threading.Event(), np.ones(1 << 22, np.float32)

    def copy() -> None:
        while not ended.is_set():
            jax.device_get(jax.device_put(numbers))

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def launch_often(case: Case, count: int) -> None:
    """Launches the persistent kernel so often, a few tokens each, with products queued before some of them."""
    params, plan = case.runner.params, case.plan
    state = jax.jit(case.begin)(params)
    program = case.program("persistent")
    x = jnp.ones((4096, 4096), jnp.bfloat16)
    busy = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: (y @ x) * 1e-4, x))
    until = jnp.int32(3)
    expected = np.asarray(jax.block_until_ready(program(params, plan, state, until)).tokens)
    start = time.perf_counter()
    for number in range(1, count + 1):
        other = busy(x) if number % 10 == 0 else x
        found = program(params, plan, state, until).tokens
        if number % 500 == 0 or number == count:
            assert (np.asarray(found) == expected).all(), f"launch {number} found other tokens"
            jax.block_until_ready(other)
            print(f"    {number} launches of the same tokens in {time.perf_counter() - start:.1f} s", flush=True)


def profile(case: Case, folder: Path) -> None:
    """Prints how many cycles each part of one launch of the persistent kernel took, the median of its programs."""
    folder.mkdir(parents=True, exist_ok=True)
    params, plan = case.runner.params, case.plan
    state = jax.jit(case.begin)(params)
    program = case.program("persistent")
    for _ in range(3):
        jax.block_until_ready(program(params, plan, state, jnp.int32(case.options.tokens)))
        jax.effects_barrier()
    found: dict[str, dict[int, list[float]]] = {}
    traces: dict[int, list[tuple[str, float]]] = {}
    for event in json.loads(max(folder.glob("*.json")).read_text())["traceEvents"]:
        stack = traces.setdefault(event["tid"], [])
        if event["ph"] == "B":
            stack.append((event["name"], event["ts"]))
        else:
            path = "/".join(name for name, _ in stack)
            of = found.setdefault(path, {}).setdefault(event["tid"], [])
            of.append(1e3 * (event["ts"] - stack.pop()[1]))
    for path, programs in found.items():
        times = sorted(one for cycles in programs.values() for one in cycles)
        count = max(map(len, programs.values()))
        slowest = [max(cycles[-n] for cycles in programs.values() if len(cycles) >= n) for n in range(1, count + 1)]
        print(
            f"    {path:34} {count:3} times in {len(programs):3} programs, "
            f"cycles: median {statistics.median(times):6.0f}, "
            f"{times[len(times) // 20]:6.0f} to {times[-1 - len(times) // 20]:6.0f}, "
            f"of the slowest {statistics.median(slowest):6.0f}", flush=True,
        )  # fmt: skip


def compile_for(target: Path, case: Case, hows: list[str]) -> None:
    """Compiles for a card that is not there, and prints what the programs take."""
    state = jax.eval_shape(case.begin, case.runner.params)
    given = (case.runner.params, case.plan, state, jax.ShapeDtypeStruct((), jnp.int32))
    for how in hows:
        lowered = case.program(how).lower(*shapes_on(card_of(target), given))
        memory = lowered.compile(compiler_options=UNTIMED).memory_analysis()
        assert memory is not None
        print(f"    {how}: compiled, {memory.temp_size_in_bytes / 1e6:.1f} MB of scratch memory", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of random weights")
    parser.add_argument("--model", default="", help="or a trained model: a run, a folder, a name")
    parser.add_argument("--width", type=whole, default=0, help="in place of the shape's, with heads of 64")
    parser.add_argument("--quantize", default="", choices=["", "int8"], help="matrices of 8 bits")
    parser.add_argument("--ends", type=int, default=0, help="blocks of its own before, and as many after, the core")
    parser.add_argument("--parallel", action="store_true", help="parallel branches")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu_tanh", help="of a model of --shape")
    parser.add_argument("--steps", type=several(whole), default="12,3", help="steps over the core: A,B")
    parser.add_argument("--context", type=whole, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=whole, default=256, help="tokens to generate")
    parser.add_argument("--rows", type=whole, default=1, help="rows that are continued together, each of other tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="draw among so many likeliest tokens")
    parser.add_argument("--how", type=several(one_of(HOWS)), default=",".join(HOWS), help="which ways, in turns")
    layout = numbers_by_name(field.name for field in dataclasses.fields(Layout))
    parser.add_argument("--layout", type=layout, default="{}", help=f"numbers of `{Layout.__module__}.Layout`, as JSON")
    parser.add_argument("--repeats", type=whole, default=7)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="against float32")
    parser.add_argument("--launches", type=int, default=0, help="launch the persistent kernel so often, and end")
    parser.add_argument("--profile", default="", help="a folder for a trace of one token; end with what its parts take")
    parser.add_argument("--compile_for", type=Path, help="a description of a card that is not there, to compile for")
    parser.add_argument("--out", type=Path, help="where to write all times as JSON")
    options = parser.parse_args()
    if options.profile and (options.tokens > 2 or max(options.steps) > 6):
        parser.error("--profile has room for one token in 6 steps: give --tokens=2 --steps=6")
    if options.width % 64:
        parser.error(f"--width={options.width} is no multiple of 64, the width of a head")
    shaping = ("shape", "width", "ends", "parallel", "activation")
    given = [f"--{name}" for name in shaping if getattr(options, name) != parser.get_default(name)]
    if options.model and given:
        parser.error(
            f"{', '.join(given)}: these are of random weights, and --model={options.model} has its own: omit them"
        )
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    model, results = model_of(options), {}
    for steps in options.steps:
        case = Case(model, steps, options)
        products = "by warps" if case.layout.by_warps else "by wgmma"
        size = f"{case.layout.steps} evaluations, readout of {case.layout.readout_bits} bits, products {products}"
        print(f"  {options.rows} rows, {steps} steps, {size}, context {options.context}", flush=True)
        if options.compile_for:
            compile_for(options.compile_for, case, options.how)
        elif options.profile:
            profile(case, Path(options.profile))
        elif options.launches:
            with copies():
                launch_often(case, options.launches)
        else:
            results[steps] = measure(case, options.how, options.repeats)
            if options.out:
                options.out.write_text(json.dumps({"options": vars(options), "results": results}, default=str) + "\n")


if __name__ == "__main__":
    run_program(main)
