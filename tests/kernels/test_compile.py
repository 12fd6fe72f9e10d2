"""Programs are compiled for an H200 by a machine that has none, where JAX's plugin for CUDA is installed."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.thorough import thorough

ROOT = Path(__file__).parents[2]
if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_cuda12_plugin") is None:
    pytest.skip("jax-cuda12-plugin is not installed (`make test-newest` does)", allow_module_level=True)


H200 = "benchmarks/h200.textproto"
CASES = {
    "--model=small-decoder --steps=1": "persistent,launches",
    "--shape=small --steps=12 --parallel --temperature=1 --top_k=40": "persistent",
    '--shape=medium --steps=5 --ends=1 --layout={"marks":false}': "persistent",
    "--shape=small --steps=3 --parallel --temperature=1": "persistent",
    "--shape=small --steps=12 --parallel --rows=8": "persistent",
    "--shape=medium --steps=1 --activation=gelu": "persistent,launches",
    '--shape=small --steps=3 --parallel --rows=9 --layout={"attends_by_warps":true}': "persistent",
    "--shape=small --steps=3 --rows=32 --temperature=1": "persistent",
    "--shape=small --steps=1 --width=1152 --quantize=int8 --temperature=1": "persistent,launches",
    "--model=small-decoder --steps=1 --rows=3 --temperature=1": "persistent,launches",
}
MORE = {
    "--shape=small --steps=3 --rows=32": "launches",
    '--shape=small --steps=3 --layout={"by_warps":false}': "persistent",
    '--shape=medium --steps=5 --parallel --layout={"attends_by_warps":true}': "persistent",
    "--shape=small --steps=3 --width=1536 --quantize=int8": "persistent",
}


@pytest.mark.parametrize(("options", "hows"), [*CASES.items(), *(thorough(*case) for case in MORE.items())])
def test_kernels_compile_for_a_card_that_is_not_there(options, hows):
    printed = run("benchmarks.decode_kernel", f"--how={hows}", *options.split(), f"--compile_for={H200}")
    for how in hows.split(","):
        assert f"{how}: compiled" in printed


def test_an_encoder_reads_many_tokens_by_products_that_end_with_the_gelu():
    product = r'= \(bf16\[4096,(\d+)\].*custom_call_target="__cublas.*?"epilogue":"(\w+)"'
    found = Counter(re.findall(product, run("tests.kernels.reader", H200)))
    steps = 2
    assert found.pop(("3072", "BIAS_GELU")) == steps
    assert {size for size, _ in found} == {"768"} and found.total() == 5 * steps, "queries, keys, values; out; down"


def test_packed_documents_are_trained_on_without_a_mask():
    program = run("tests.kernels.packed", H200)
    assert {"mha_forward", "mha_backward"} <= set(re.findall(r"mha_\w+", program))
    assert "[8,1,256,256]" not in program and "[8,2,256,256]" not in program, "neither a mask nor scores"


def run(module: str, *arguments: str) -> str:
    """Returns what a module prints on a machine without a card."""
    environment = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
