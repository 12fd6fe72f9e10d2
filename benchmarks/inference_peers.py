"""What `benchmarks.inference` compares odelm with: GPT-2 and ALBERT of `transformers` under torch.compile."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.timing import ENCODER_WORDS, ENCODERS, Measure, Times, median_seconds
from benchmarks.training import SHAPES, VOCABULARY

FACTOR = 128
"""ALBERT's width of embeddings."""


def transformers_generate(options: argparse.Namespace) -> Measure:
    import torch  # pyright: ignore[reportMissingImports]

    model, _, prompts, wait = _gpt2(options)
    length = options.length

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

    def measure(repeats: int = options.repeats) -> Times:
        text, prompt = (median_seconds(call, wait, repeats) for call in (generate, read))
        return {"generate": (text - prompt) / (length - 1)}

    measure(1)
    return measure


def transformers_loop(options: argparse.Namespace) -> Measure:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    model, config, prompts, wait = _gpt2(options)
    length = options.length
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def seconds() -> float:
        cache = transformers.StaticCache(config=config, max_cache_len=2 * length)
        with torch.inference_mode():
            place = torch.arange(length, device=prompts.device)
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
        return (time.perf_counter() - start) / (length - 1)

    def measure(repeats: int = options.repeats) -> Times:
        return {"loop of CUDA graphs": statistics.median([seconds() for _ in range(repeats + 2)][2:])}

    measure(1)
    return measure


def _gpt2(options: argparse.Namespace) -> tuple[Any, Any, Any, Callable[[], None]]:
    """Returns the model, its config, the prompts and what waits until torch is done."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    shape = SHAPES[options.shape]
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=1024, n_embd=shape["width"], n_layer=shape["depth"], n_head=shape["heads"],
        attn_implementation="sdpa", bos_token_id=0, eos_token_id=None,  # pyright: ignore
    )  # fmt: skip
    device, wait = _device(torch)
    model: Any = transformers.GPT2LMHeadModel(config)
    prompts = torch.randint(0, VOCABULARY, (options.batch, options.length), device=device)
    return model.eval().to(device, torch.bfloat16), config, prompts, wait


def transformers_encode(options: argparse.Namespace, label: str, mode: str) -> Measure:
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
    compiled = torch.compile(model, mode=mode)

    def measure(repeats: int = options.repeats) -> Times:
        with torch.inference_mode():
            return {label: median_seconds(lambda: compiled(tokens, attention_mask=mask), wait, repeats)}

    measure(1)
    return measure


def _device(torch: Any) -> tuple[str, Callable[[], None]]:
    """Returns the device of torch's side, and what waits until it is done."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.synchronize
    return "cpu", lambda: None
