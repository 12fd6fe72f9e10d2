"""The forward pass of an ALBERT-base shape on CPU, against Hugging Face transformers, in alternating processes.

    pip install ".[bench]"; python -m benchmarks.albert_forward [--rounds=5] [--batch=1] [--length=128]

Both compute float32 hidden states of the same shapes with random weights. Each round runs one process of
either kind; the medians of each and the median of the rounds' ratios are printed. Arithmetic that agrees to
rounding is checked elsewhere; this only measures time.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks import run_program
from benchmarks.options import whole

REPEATS, WARMUP = 20, 3


def time_calls(call: Callable[[], object]) -> float:
    """Returns the median milliseconds of a call."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def run_odelm(batch: int, length: int) -> float:
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    import odelm

    config = dataclasses.replace(odelm.load_recipe("encoder_base").model, time_modulation=False, dtype="float32")
    graph, params = nnx.split(odelm.create(config, rngs=nnx.Rngs(0)), nnx.Param)
    tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, config.vocab_size)
    mask = jnp.ones((batch, length), bool)
    encode = jax.jit(lambda params, tokens, mask: nnx.merge(graph, params).encode(tokens, mask=mask))
    return time_calls(lambda: encode(params, tokens, mask).block_until_ready())


def run_transformers(batch: int, length: int) -> float:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AlbertConfig, AlbertModel  # pyright: ignore[reportMissingImports]

    config = AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=12)
    model = AlbertModel(config, add_pooling_layer=False).eval()
    tokens = torch.randint(0, config.vocab_size, (batch, length))
    mask = torch.ones_like(tokens)
    with torch.inference_mode():
        return time_calls(lambda: model(tokens, attention_mask=mask))


RUNS = {"odelm": run_odelm, "transformers": run_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=whole, default=5)
    parser.add_argument("--batch", type=whole, default=1)
    parser.add_argument("--length", type=whole, default=128)
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(RUNS[arguments.only](arguments.batch, arguments.length))
        return
    shape = [f"--batch={arguments.batch}", f"--length={arguments.length}"]
    times: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(arguments.rounds):
        for name in RUNS:
            command = [sys.executable, "-m", "benchmarks.albert_forward", f"--only={name}", *shape]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            times[name].append(float(done.stdout.split()[-1]))
    for name, values in times.items():
        print(f"{name:13} median {statistics.median(values):7.1f} ms  ({min(values):.1f} to {max(values):.1f})")
    ratios = [a / b for a, b in zip(times["odelm"], times["transformers"], strict=True)]
    print(f"odelm / transformers: median {statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    run_program(main)
