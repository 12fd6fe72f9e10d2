"""Inference against `transformers` under torch.compile, on one GPU: a token of a decoder, or a pass of an encoder.

    python -m benchmarks.inference --kind=decode --shape=small --batch=1
    python -m benchmarks.inference --kind=encode --shape=base --batch=32 --length=512

Both sides compute in bfloat16 with random weights and take turns, a process each, `--rounds` times. A decoder continues
prompts of `--length` tokens greedily by as many, with a memory: the time of a token is that of all but the first, which
comes with the prompt. `transformers` has GPT-2's block and a static cache, once by `generate` and once by a loop
written for it, which replays CUDA graphs; odelm has its default block, at full depth and at a half, a third and a
quarter of the steps. An encoder is ALBERT's on both sides, from tokens to the last hidden states, padding allowed for.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.training import SHAPES, VOCABULARY

ENCODERS = {
    "tiny": {"width": 64, "heads": 4, "depth": 4},
    "base": {"width": 768, "heads": 12, "depth": 12},
    "large": {"width": 1024, "heads": 16, "depth": 24},
}
ENCODER_WORDS, FACTOR = 30_000, 128
Times = dict[str, float]
"""Seconds of a token or a pass, by how it is computed."""


def median_seconds(call: Callable[[], Any], wait: Callable[[], None], repeats: int, warmup: int = 3) -> float:
    """Returns the median of the seconds that a call takes until it is done."""
    for _ in range(warmup):
        call()
    found = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def odelm_decode(options: argparse.Namespace) -> Times:
    import numpy as np
    from flax import nnx

    import odelm

    shape, length = SHAPES[options.shape], options.length
    config = odelm.ModelConfig(
        kind="decoder", vocab_size=VOCABULARY, width=shape["width"], heads=shape["heads"], depth=shape["depth"],
        max_length=1024, dtype="bfloat16",
    )  # fmt: skip
    model = odelm.CausalLM(config, rngs=nnx.Rngs(0))
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (options.batch, length)).tolist()
    found = {}
    for steps in _counts(shape["depth"]):
        generator = odelm.Generator(model, steps=steps)

        def text(count: int, generator: odelm.Generator = generator) -> float:
            return median_seconds(lambda: generator(prompts, new_tokens=count), lambda: None, options.repeats)

        found[f"{steps} steps"] = (text(length) - text(1)) / (length - 1)
    return found


def odelm_encode(options: argparse.Namespace) -> Times:
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    import odelm
    from odelm.infer.runner import Runner
    from odelm.models import Inputs

    shape = ENCODERS[options.shape]
    recipe = odelm.load_recipe("encoder_base").model
    config = dataclasses.replace(recipe, **shape, time_modulation=False, dtype="bfloat16", vocab_size=ENCODER_WORDS)
    runner = Runner.of(odelm.create(config, rngs=nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(0), (options.batch, options.length), 0, ENCODER_WORDS)
    # As `odelm.EncoderRunner` says padding.
    inputs = Inputs(tokens, lengths=jnp.full(options.batch, options.length, jnp.int32))
    encode = jax.jit(lambda params, plan, inputs: nnx.merge(runner.graph, params).encode(inputs, plan=plan))
    found = {}
    for steps in _counts(shape["depth"]):
        plan = runner.plan(steps, "euler")
        found[f"{steps} steps"] = median_seconds(
            lambda plan=plan: encode(runner.params, plan, inputs).block_until_ready(), lambda: None, options.repeats
        )
    return found


def _counts(depth: int) -> list[int]:
    return sorted({depth, depth // 2, depth // 3, depth // 4}, reverse=True)


def transformers_decode(options: argparse.Namespace) -> Times:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    shape, length = SHAPES[options.shape], options.length
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=1024, n_embd=shape["width"], n_layer=shape["depth"], n_head=shape["heads"],
        attn_implementation="sdpa", bos_token_id=0, eos_token_id=None,  # pyright: ignore
    )  # fmt: skip
    device, wait = _device(torch)
    model: Any = transformers.GPT2LMHeadModel(config)
    model = model.eval().to(device, torch.bfloat16)
    prompts = torch.randint(0, VOCABULARY, (options.batch, length), device=device)

    def generate() -> None:
        with torch.inference_mode():
            model.generate(
                prompts, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0,
                cache_implementation="static",
            )  # fmt: skip

    def read() -> None:
        # The prompt alone is not generated from, which would compile everything again for another length of the cache.
        with torch.inference_mode():
            model(input_ids=prompts).logits[:, -1].argmax(-1)

    text, prompt = (median_seconds(call, wait, options.repeats) for call in (generate, read))
    found = {"generate": (text - prompt) / (length - 1)}
    torch._dynamo.reset()
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    seconds = []
    for _ in range(options.repeats + 2):
        cache = transformers.StaticCache(config=config, max_cache_len=2 * length)
        with torch.inference_mode():
            place = torch.arange(length, device=device)
            logits = model(input_ids=prompts, past_key_values=cache, use_cache=True, cache_position=place).logits
            place = place[-1:] + 1
            wait()
            start = time.perf_counter()
            for _ in range(length - 1):
                token = logits[:, -1].argmax(-1, keepdim=True)
                torch.compiler.cudagraph_mark_step_begin()
                logits = step(
                    input_ids=token, past_key_values=cache, use_cache=True, cache_position=place,
                    position_ids=place[None].expand(options.batch, 1),
                ).logits  # fmt: skip
                place = place + 1
            wait()
        seconds.append((time.perf_counter() - start) / (length - 1))
    return found | {"loop of CUDA graphs": statistics.median(seconds[2:])}


def transformers_encode(options: argparse.Namespace) -> Times:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    shape = ENCODERS[options.shape]
    config = transformers.AlbertConfig(
        vocab_size=ENCODER_WORDS, embedding_size=FACTOR, hidden_size=shape["width"], num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"], intermediate_size=4 * shape["width"],
        attn_implementation="sdpa",  # pyright: ignore
    )  # fmt: skip
    device, wait = _device(torch)
    model = transformers.AlbertModel(config, add_pooling_layer=False).eval().to(device, torch.bfloat16)
    tokens = torch.randint(0, ENCODER_WORDS, (options.batch, options.length), device=device)
    mask = torch.ones_like(tokens)
    found = {}
    for label, mode in {"torch.compile": "default", "with CUDA graphs": "reduce-overhead"}.items():
        torch._dynamo.reset()
        compiled = torch.compile(model, mode=mode)
        with torch.inference_mode():
            found[label] = median_seconds(lambda: compiled(tokens, attention_mask=mask), wait, options.repeats)  # noqa: B023
    return found


def _device(torch: Any) -> tuple[str, Callable[[], None]]:
    """Returns the device of torch's side, and what waits until it is done."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.synchronize
    return "cpu", lambda: None


SIDES = {
    ("transformers", "decode"): transformers_decode,
    ("transformers", "encode"): transformers_encode,
    ("odelm", "decode"): odelm_decode,
    ("odelm", "encode"): odelm_encode,
}


def in_turns(options: argparse.Namespace) -> Times:
    """Runs each side in a process of its own, `rounds` times, and returns the median of what each measured."""
    given = [f"--{name}={value}" for name, value in vars(options).items() if name not in ("side", "out")]
    found: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for side in ("transformers", "odelm"):
            command = [sys.executable, "-m", "benchmarks.inference", f"--side={side}", *given]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{side} failed with status {done.returncode}", flush=True)
                continue
            for label, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                found.setdefault(f"{side}: {label}", []).append(seconds)
    return {label: statistics.median(seconds) for label, seconds in found.items()}


def show(times: Times, options: argparse.Namespace) -> None:
    """Prints each time, and how many times as fast it is as the peers."""
    peers = {label: seconds for label, seconds in times.items() if label.startswith("transformers")}
    print(f"{options.kind} {options.shape}, batch {options.batch}, length {options.length}, bfloat16")
    for label, seconds in times.items():
        ratios = "  ".join(f"{peer / seconds:5.2f}x" for peer in peers.values())
        print(f"  {label:36} {seconds * 1e6:10.1f} us  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("decode", "encode"), default="decode")
    parser.add_argument("--shape", choices=sorted({*SHAPES, *ENCODERS}), default="small")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", choices=("transformers", "odelm"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="a file for the seconds, as JSON")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side, options.kind](options)))
        return
    times = in_turns(options)
    show(times, options)
    if options.out:
        options.out.write_text(json.dumps(vars(options) | {"out": None, "seconds": times}) + "\n")


if __name__ == "__main__":
    main()
