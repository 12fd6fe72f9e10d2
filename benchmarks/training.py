"""Tokens/s of pre-training against `transformers` under torch.compile, on one GPU.

    python -m benchmarks.training --shape=small [--block=gpt2] [--out=FILE.json]

Both sides train GPT-2's shape on synthetic tokens, bfloat16 products and float32 parameters, AdamW, no dropout. The
sides take turns, a process each, so that a card's memory is one side's alone: `transformers`, then odelm, `--rounds`
times. Of odelm every count of steps has its update timed; "random" is the mean of their times. Each turn prints the
median time of an update, tokens/s, the share of `--peak` a device, and the memory beside parameters and optimiser.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import run_program
from benchmarks.options import one_of, several, whole, written
from odelm.config import Config, MeshConfig, ModelConfig, StepSamplingConfig, TrainConfig
from odelm.train.flops import training_flops

SHAPES = {
    "tiny": {"width": 64, "heads": 4, "depth": 4, "batch": 4, "length": 64},
    "small": {"width": 768, "heads": 12, "depth": 12, "batch": 32, "length": 1024},
    "medium": {"width": 1024, "heads": 16, "depth": 24, "batch": 16, "length": 1024},
}
VOCABULARY = 50_304
BLOCKS = {
    "gpt2": {
        "norm": "layernorm", "norm_eps": 1e-5, "positions": "learned", "qk_norm": False, "bias": True,
        "time_modulation": False,
    },
    "modern": {},
}  # fmt: skip
"""`gpt2` is that model's block; `modern` is odelm's default: rotary positions, norms of queries and keys, time."""


def median_of(run: Callable[[], None], wait: Callable[[], None], *, calls: int, repeats: int) -> float:
    """Returns the median over `repeats` of the seconds that one of `calls` calls in a row takes."""
    found = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def odelm_config(options: argparse.Namespace) -> tuple[Config, tuple[int, ...]]:
    """Returns what is trained, and the counts of steps that are timed."""
    shape = SHAPES[options.shape]
    sizes = dict(zip(("data", "fsdp", "tensor"), options.mesh, strict=True))
    depth, length = shape["depth"], shape["length"]
    model = ModelConfig(
        kind="decoder", vocab_size=options.vocabulary, width=shape["width"], heads=shape["heads"], depth=depth,
        max_length=length, groups=depth if options.unshared else 1, **BLOCKS[options.block],
    )  # fmt: skip
    config = Config(
        model=model,
        step_sampling=StepSamplingConfig(kind="fixed" if options.unshared else "random_count"),
        train=TrainConfig(
            batch_size=shape["batch"] * sizes["data"] * sizes["fsdp"], length=length, remat=options.remat or None
        ),
        mesh=MeshConfig(**sizes),
    ).validate()
    full = options.full or options.unshared
    return config, (depth,) if full else tuple(sorted({depth, depth // 2, depth // 3, depth // 4}))


def odelm_side(options: argparse.Namespace) -> dict[str, Any]:
    """Times the update at every count of steps."""
    import jax

    from odelm.ode import grid
    from odelm.sharding import make_mesh, place_batch
    from odelm.train.optimizer import make_optimizer
    from odelm.train.step import compile_updates, graph_of, init_state, make_update

    config, counts = odelm_config(options)
    depth, mesh = config.model.depth, make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, 1000, config.model)
    graph, _ = graph_of(config)
    state, batch = init_state(config, optimizer, mesh), place_batch(synthetic(config), mesh)
    start = time.perf_counter()
    compiled: dict[int, Any] = {}
    compiled |= compile_updates(make_update(config, graph, optimizer), state, batch, counts, mesh, lambda _: None)
    result: dict[str, Any] = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "tokens": config.train.batch_size * config.train.length,
        "mesh": written(options.mesh),
        "compile_s": time.perf_counter() - start,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
        "seconds": {},
    }
    box = [state, {"loss": None}]

    def run(count: int) -> None:
        box[:] = compiled[count](box[0], batch, grid.equal(depth, count))

    def wait() -> None:
        jax.block_until_ready(box[1])

    for count in counts:
        run(count)
        result["seconds"][count] = median_of(partial(run, count), wait, calls=options.calls, repeats=options.repeats)
    memory = [program.memory_analysis() for program in compiled.values()]
    result["scratch_gib"] = max(m.temp_size_in_bytes for m in memory) / 2**30
    if options.profile:
        result["kernels"] = kernels_of(lambda count: (run(count), wait()), (counts[-1], counts[0]), options.profile)
    result["loss"] = float(box[1]["loss"])
    return result


def synthetic(config: Config, *, share: int = 0, shares: int = 1) -> dict[str, np.ndarray]:
    """Returns a batch of random tokens, or the rows of one of several processes."""
    rows, length = config.train.batch_size // shares, config.train.length
    tokens = np.random.default_rng(share).integers(0, config.model.vocab_size, (rows, length + 1), dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((rows, length), np.float32)}


def kernels_of(run: Callable[[int], Any], counts: Iterable[int], folder: str) -> dict[int, dict[str, float]]:
    """Returns the milliseconds of the kernels of an update at each count; traces are left in the folder."""
    from benchmarks.kernels import profile

    return {count: profile(partial(run, count), Path(folder) / str(count)) for count in counts}


def transformers_side(options: argparse.Namespace) -> dict[str, Any]:
    """Times the update of an ordinary GPT-2."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    shape = SHAPES[options.shape]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = gpt2(options).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model)
    tokens = torch.randint(0, options.vocabulary, (shape["batch"], shape["length"]), device=device)
    losses: list[Any] = []

    def run() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[:] = [loss.detach()]

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    run()
    wait()
    compile_s = time.perf_counter() - start
    run()
    wait()
    used = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_of(run, wait, calls=options.calls, repeats=options.repeats)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": shape["batch"] * shape["length"],
        "compile_s": compile_s,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": {shape["depth"]: seconds},
        "scratch_gib": (peak - used) / 2**30,
        "loss": float(losses[0]),
    }


def gpt2(options: argparse.Namespace) -> Any:
    """Returns an ordinary GPT-2 without dropout."""
    import transformers  # pyright: ignore[reportMissingImports]

    shape = SHAPES[options.shape]
    config = transformers.GPT2Config(
        vocab_size=options.vocabulary, n_positions=shape["length"], n_embd=shape["width"], n_layer=shape["depth"],
        n_head=shape["heads"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


SIDES = ("transformers", "odelm", "unshared")


def in_turns(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs each side in a process of its own, `rounds` times, and returns what they measured."""
    given = [
        f"--{name}={written(value)}" for name, value in vars(options).items() if name not in ("side", "out", "unshared")
    ]
    found = []
    for turn in range(options.rounds):
        for side in options.sides:
            extra = ["--unshared"] if side == "unshared" else []
            command = [sys.executable, "-m", "benchmarks.training", f"--side={side}", *extra, *given]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{side} failed with status {done.returncode}", flush=True)
                continue
            found.append({"side": side, "turn": turn} | json.loads(done.stdout.splitlines()[-1]))
            show(found[-1], options)
    return found


def show(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints a line for each count that a side has measured, and for random counts."""
    shape = SHAPES[options.shape]
    tokens = result["tokens"]
    model = ModelConfig(width=shape["width"], heads=shape["heads"], depth=shape["depth"], vocab_size=options.vocabulary)
    devices = math.prod(map(int, result.get("mesh", "1").split(",")))
    parameters = f"{result['parameters'] / 1e6:.1f} M parameters"
    rows = {
        f"{count} steps": (float(s), tokens * training_flops(model, steps=int(count), length=shape["length"]))
        for count, s in result["seconds"].items()
    }
    if len(rows) > 1:
        rows["random"] = tuple(statistics.mean(column) for column in zip(*rows.values(), strict=True))
    print(
        f"{result['side']} ({options.shape}, {options.block}, mesh {result.get('mesh', '1')}): {parameters}, "
        f"{result['scratch_gib']:.1f} GiB beside them, compiled in {result['compile_s']:.0f} s, {result['device']}, "
        + " ".join(f"{name} {version}" for name, version in result["versions"].items())
    )
    for name, (seconds, operations) in rows.items():
        rate = operations / seconds / 1e12 / devices
        print(
            f"  {name:10} {1e3 * seconds:8.2f} ms {tokens / seconds / 1e3:8.1f} k tokens/s"
            f"  {rate:6.0f} TFLOP/s  {rate / options.peak:5.1%}",
            flush=True,
        )
    for count, parts in result.get("kernels", {}).items():
        print(f"  kernels of {count} steps, ms an update:")
        for name, milliseconds in parts.items():
            print(f"    {milliseconds:8.3f}  {name}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--block", choices=BLOCKS, default="gpt2")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument(
        "--mesh",
        type=several(whole, 3),
        default="1,1,1",
        help="data, fsdp and tensor of odelm; the first two make the batch larger",
    )
    parser.add_argument("--full", type=int, default=0, help="1: full depth only")
    parser.add_argument("--remat", default="", help="train.remat of odelm")
    parser.add_argument("--rounds", type=whole, default=2)
    parser.add_argument("--calls", type=whole, default=5, help="updates in a row that are timed together")
    parser.add_argument("--repeats", type=whole, default=7)
    parser.add_argument("--peak", type=float, default=790, help="TFLOP/s of a large bfloat16 matrix product")
    parser.add_argument("--profile", default="", help="a folder for traces of odelm's update; prints its kernels")
    parser.add_argument(
        "--sides", type=several(one_of(SIDES)), default="transformers,odelm", help=f"of {', '.join(SIDES)}"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--unshared", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="a file for the results as JSON")
    options = parser.parse_args()
    if options.side:
        measure = transformers_side if options.side == "transformers" else odelm_side
        print(json.dumps(measure(options)))
        return 0
    results = in_turns(options)
    if options.out:
        Path(options.out).write_text(json.dumps({"options": vars(options), "results": results}, indent=1) + "\n")
    return 0 if len(results) == options.rounds * len(options.sides) else 1


if __name__ == "__main__":
    run_program(main)
