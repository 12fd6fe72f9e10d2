"""Greedy text by drafts against full depth's, token by token, on held-out prompts of a run: is it the same, and faster?

    python -m benchmarks.speculation --workdir=runs/small [--drafts=1x4,2x4] [--dtype=float32]

Prompts are continued one at a time (or `--batch` at a time). The two ways take turns, prompt by prompt, and the speed
is the ratio of the medians of their times, prompts included. Where two texts part, the logits that full depth gives in
float32 after the text up to there are looked at: rounding may decide only between tokens that are nearly equal there.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import odelm
from benchmarks import run_program
from benchmarks.options import several, size, whole
from odelm.config import Config
from odelm.data.prepare import prepare
from odelm.data.windows import joined
from odelm.infer.continuation import Continuation
from odelm.infer.runner import with_options
from odelm.programs.command_line import use_compilation_cache
from odelm.run_directory import TOKENIZER


def held_out_prompts(config: Config, workdir: str, count: int, length: int) -> list[list[int]]:
    """Returns so many stretches of held-out text, always the same ones."""
    tokens = joined(prepare(config, tokenizer_file=Path(workdir) / TOKENIZER).validation).tokens
    starts = np.random.default_rng(0).choice(len(tokens) - length, count, replace=False)
    return [tokens[start : start + length].tolist() for start in starts]


def parting(model: odelm.CausalLM, prompt: list[int], plain: list[int], drafted: list[int]) -> float | None:
    """Returns by how much the logits of the two tokens at which the texts part differ; None if they do not part."""
    for place, (one, other) in enumerate(zip(plain, drafted, strict=True)):
        if one != other:
            logits = model(jnp.asarray([[*prompt, *plain[:place]]], jnp.int32))[0, -1]
            return float(abs(logits[one] - logits[other]))
    return None


def compare(options: argparse.Namespace, drafts: tuple[int, int], loaded: tuple[odelm.CausalLM, Config]) -> dict:
    """Returns what a draft of so many steps and tokens gives against the plain way."""
    (model, config), (steps, length) = loaded, drafts
    exact = with_options(model, dtype="float32")
    plain = odelm.Generator(model, dtype=options.dtype, steps=config.model.core, kernel=options.kernel)
    drafting = odelm.Generator(model, dtype=options.dtype, draft_steps=steps, draft_length=length)
    given = held_out_prompts(config, options.workdir, options.prompts, options.prompt_tokens)
    batches = [given[i : i + options.batch] for i in range(0, len(given), options.batch)]

    def timed(generator: odelm.Generator, prompts: list[list[int]]) -> tuple[float, list[Continuation]]:
        start = time.perf_counter()
        found = generator(prompts, new_tokens=options.new_tokens, logprobs=True)
        return time.perf_counter() - start, found

    for generator in (plain, drafting):
        timed(generator, batches[0])
    seconds, gaps, same, rounds, tokens = {"plain": [], "drafted": []}, [], 0, 0, 0
    for prompts in batches:
        took, texts = timed(plain, prompts)
        seconds["plain"].append(took)
        took, others = timed(drafting, prompts)
        seconds["drafted"].append(took)
        counts = drafting.draft_counts
        assert counts is not None
        rounds, tokens = rounds + counts.rounds, tokens + counts.tokens
        for prompt, text, other in zip(prompts, texts, others, strict=True):
            gap = parting(exact, prompt, text.tokens, other.tokens)
            same += gap is None
            gaps += [] if gap is None else [gap]
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "draft": f"{steps} steps x {length}",
        "texts": len(given),
        "tokens": len(given) * options.new_tokens,
        "identical_texts": same,
        "largest_gap_where_they_part": max(gaps, default=0.0),
        "tokens_per_pass": tokens / rounds,
        "ms_a_token": {name: 1e3 * median / options.new_tokens for name, median in medians.items()},
        "speedup": medians["plain"] / medians["drafted"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a run, whose prepared text is found by its config")
    parser.add_argument("--drafts", type=several(size), default="1x4", help="steps x length, several as A,B")
    parser.add_argument("--dtype", default="bfloat16", help="of products")
    parser.add_argument("--kernel", default="xla", help="by which full depth decodes; drafts are always XLA's")
    parser.add_argument("--prompts", type=whole, default=50)
    parser.add_argument("--prompt_tokens", type=whole, default=32)
    parser.add_argument("--new_tokens", type=whole, default=200)
    parser.add_argument("--batch", type=whole, default=1)
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    options = parser.parse_args()
    use_compilation_cache("~/.cache/odelm/compiled")
    model, config, _ = odelm.load(options.workdir)
    if not isinstance(model, odelm.CausalLM):
        parser.error(f"{options.workdir} is no decoder")
    results = []
    for drafts in options.drafts:
        results.append(compare(options, drafts, (model, config)))
        print(json.dumps(results[-1]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
