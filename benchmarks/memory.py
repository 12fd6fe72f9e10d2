"""What a generator says that its memory will take, against what the device has in use afterwards.

    python -m benchmarks.memory --shape=small --rows=32 --length=4096

All but the last 32 positions are a prompt of random tokens. `said` is `Generator.memory_bytes`, known before anything
is allocated; `kept` is what the device has more in use once the prompt is read, `peak` the most while it is read, when
the memory of the prompt is there twice, and what the program needs besides.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import odelm
from benchmarks import run_program
from benchmarks.options import several, whole
from benchmarks.training import SHAPES, VOCABULARY
from odelm.infer.sampling import sampling_options

NEW = 32


def measure(generator: odelm.Generator, rows: int, length: int) -> dict[str, int]:
    """Returns the bytes said, kept and at the peak."""
    vocabulary = generator.runner.model.config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocabulary, (rows, length - NEW)).tolist()
    device = jax.devices()[0]
    before = _stats(device)["bytes_in_use"]
    said = generator.memory_bytes(rows, length - NEW, NEW)
    state = jax.block_until_ready(generator.begin(prompts, NEW, sampling_options(), jax.random.key(0)))
    after = _stats(device)
    del state
    return {"said": said, "kept": after["bytes_in_use"] - before, "peak": after["peak_bytes_in_use"] - before}


def _stats(device: Any) -> dict[str, int]:
    stats = device.memory_stats()
    if stats is None:
        raise SystemExit(f"{device.device_kind} does not say what it has in use: run this on a GPU")
    return stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=sorted(SHAPES))
    parser.add_argument("--rows", type=whole, default=32)
    parser.add_argument("--length", type=whole, default=4096)
    parser.add_argument(
        "--steps", type=several(whole), default="3,12", help="A,B: the fewest first, since peaks are of all so far"
    )
    parser.add_argument("--out", type=Path, help="a file for the bytes, as JSON")
    options = parser.parse_args()
    shape, results = SHAPES[options.shape], {}
    config = odelm.ModelConfig(
        kind="decoder", vocab_size=VOCABULARY, width=shape["width"], heads=shape["heads"], depth=shape["depth"],
        max_length=options.length, dtype="bfloat16",
    )  # fmt: skip
    model = odelm.CausalLM(config, rngs=nnx.Rngs(0))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.rows} x {options.length}, bfloat16")
    for steps in options.steps:
        found = results[steps] = measure(odelm.Generator(model, steps=steps), options.rows, options.length)
        print(f"  {steps} steps: " + ", ".join(f"{name} {count / 2**30:.3f} GiB" for name, count in found.items()))
    if options.out:
        options.out.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    run_program(main)
