"""What the kernels of an update read and write, compiled for a card that is not there: where bandwidth goes.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu \\
        python -m benchmarks.traffic --shape=small --steps=3 --compile_for=benchmarks/h200.textproto

Needs JAX's plugin for CUDA and no GPU (docs/kernels.md, "Compiling without a card"). Every kernel of the compiled
update is listed with the bytes of its operands and results, the largest first, then the sums of products, attention and
all else. What is read twice by one kernel counts once; what a cache keeps is not known; the body of a loop counts once.
"""

import argparse
import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from benchmarks import run_program
from benchmarks.absent_card import UNTIMED, card_of
from benchmarks.options import whole
from benchmarks.training import SHAPES, VOCABULARY, odelm_config
from odelm.config import Config, StepSamplingConfig
from odelm.train.slice import bytes_of, lowered_updates
from odelm.train.step import ON_GPU

NOTHING = ("parameter", "tuple", "get-tuple-element", "constant", "bitcast", "while", "conditional", "call")
INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
INNER = ("fused", "wrapped", "region", "gemm_fusion", "triton")
"""Computations that are inside a kernel begin so."""


def kernels_of(program: str) -> list[tuple[int, str, str]]:
    """Returns the bytes, the kind and a description of every kernel of an optimised program of XLA."""
    shapes: dict[str, str] = {}
    lines, inside = [], False
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = not header.group(1).startswith(INNER)
        elif inside and (found := INSTRUCTION.match(line.strip())):
            shapes[found.group(1)] = found.group(2)
            lines.append((line, found))
    kernels = []
    for line, found in lines:
        name, shape, operation, rest = found.groups()
        if operation in NOTHING or operation.endswith("-done"):
            continue
        operands = dict.fromkeys(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
        total = bytes_of(shape) + sum(bytes_of(shapes.get(operand, "")) for operand in operands)
        where = re.search(r'op_name="([^"]*)"', line)
        described = f"{name} {shape[:60]} {where.group(1)[-60:] if where else ''}"
        kernels.append((total, _kind(operation, line), described))
    return sorted(kernels, reverse=True)


def _kind(operation: str, line: str) -> str:
    if "gemm" in line.split("=")[0] or "__cublas" in line or "matmul" in line.split("metadata")[0]:
        return "products"
    return "attention" if operation == "custom-call" and "dot_product_attention" in line else "all else"


def compiled_update(config: Config, target: Path) -> str:
    """Returns the program of an update on a card that a GpuTargetConfigProto describes, as text."""
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):  # what the models ask for
        _, lowered = next(lowered_updates(config, [card_of(target)]))
    options: Any = ON_GPU | UNTIMED
    return lowered.compile(options).as_text() or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--block", choices=("gpt2", "modern"), default="modern")
    parser.add_argument("--steps", type=whole, default=3)
    parser.add_argument("--rows", type=whole, default=40, help="how many kernels to list")
    parser.add_argument("--compile_for", type=Path, required=True, help="a description of the card")
    options = parser.parse_args()
    given = dict(mesh=[1, 1, 1], vocabulary=VOCABULARY, unshared=False, remat="", full=False)
    config, _ = odelm_config(argparse.Namespace(**vars(options), **given))
    model = dataclasses.replace(config.model, dtype="bfloat16")
    counts = StepSamplingConfig(kind="random_count", counts=(options.steps,))
    config = dataclasses.replace(config, model=model, step_sampling=counts).validate()
    kernels = kernels_of(compiled_update(config, options.compile_for))
    for size, kind, described in kernels[: options.rows]:
        print(f"{size / 1e6:9.1f} MB  {kind:9}  {described}")
    sums, numbers = Counter[str](), Counter(kind for _, kind, _ in kernels)
    for size, kind, _ in kernels:
        sums[kind] += size
    for kind, total in sums.most_common():
        print(f"{total / 1e9:9.2f} GB  {kind}, {numbers[kind]} kernels")


if __name__ == "__main__":
    run_program(main)
