"""What a text longer than the model's positions costs: losses by position, where each token sees a window.

    python -m benchmarks.windows --model=small-decoder --text=FILE --windows=256,512,1024 --length=4096

Documents of the file (.txt, or .jsonl with a document a line) that have at least `--length` tokens are cut there. It
prints the loss, in nats a token, of each quarter of the positions, and what a token costs that begins a text anew every
`--restart` positions: what one would do without a window.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import odelm
from benchmarks import run_program
from benchmarks.options import several, whole
from odelm.data.sources.documents import checked, text_documents
from odelm.errors import InputError
from odelm.infer.runner import Runner, check_model
from odelm.models import Inputs
from odelm.tokenizer import needed

PARTS = 4


def with_positions(model: Any, count: int) -> Any:
    """Returns the model with more positions, which its parameters do not depend on."""
    config = dataclasses.replace(model.config, max_length=count)
    longer = nnx.eval_shape(lambda: odelm.create(config, rngs=nnx.Rngs(0)))
    nnx.update(longer, nnx.state(model, nnx.Param))
    return longer


def losses(runner: Runner, plan: Any, rows: np.ndarray, window: int, *, restart: int = 0) -> np.ndarray:
    """Returns the nats of each token of rows (N, L) but the first, (N, L - 1); with `restart` a text begins anew after
    so many."""

    @jax.jit
    def nats(params: Any, row: jax.Array) -> jax.Array:
        model = nnx.merge(runner.graph, params)
        memory = model.memory(plan, batch=1, room=len(row), window=window)
        segments = (jnp.arange(len(row)) // restart)[None] if restart else None
        hidden, _ = model.run(Inputs(row[None], segments=segments), plan, memory=memory)
        logits = jax.lax.map(lambda h: jax.nn.log_softmax(model.readout(h[None])[0]), hidden[0, :-1])
        return -jnp.take_along_axis(logits, row[1:, None], axis=1)[:, 0]

    return np.stack([np.asarray(nats(runner.params, jnp.asarray(row))) for row in rows])


def long_documents(path: Path, encode: Any, length: int, most: int) -> np.ndarray:
    """Returns the first tokens of the first documents that are long enough, int32 (N, length)."""
    found: list[list[int]] = []
    for document in checked(text_documents(path)):
        if len(document.text) >= 2 * length and len(ids := encode(document.text[: 12 * length]).ids) >= length:
            found.append(ids[:length])
        if len(found) == most:
            break
    if not found:
        raise InputError(f"{path} has no document of {length} tokens; give another --text or a smaller --length")
    return np.array(found, np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small-decoder", help="a run, a folder, a name")
    parser.add_argument("--text", type=Path, required=True, help="a file of long documents")
    parser.add_argument("--windows", type=several(whole), default=[256, 512, 1024], help="positions, several as A,B")
    parser.add_argument("--length", type=whole, default=4096, help="tokens of a document")
    parser.add_argument("--documents", type=whole, default=8, help="at most so many")
    parser.add_argument("--steps", type=whole, default=None, help="steps over the depth; default: all")
    parser.add_argument("--restart", type=whole, default=1024, help="begin anew after so many, for comparison")
    options = parser.parse_args()
    if max(*options.windows, options.restart) > options.length:
        parser.error(f"--windows and --restart are at most --length, {options.length}")

    model, _, tokenizer = odelm.load(options.model, with_profile=False)
    check_model(model, "decoder")
    runner = Runner.of(with_positions(model, options.length))
    plan = runner.model.plan(steps=options.steps)
    rows = long_documents(options.text, needed(tokenizer).encode, options.length, options.documents)
    print(f"{len(rows)} documents, losses of each quarter of {options.length} positions")
    cases = {f"window {window}": dict(window=window) for window in options.windows}
    cases[f"anew every {options.restart}"] = dict(window=options.restart, restart=options.restart)
    for name, case in cases.items():
        found = losses(runner, plan, rows, **case)
        parts = [part.mean(axis=1) for part in np.array_split(found, PARTS, axis=1)]
        print(f"{name:>18}  " + "  ".join(f"{x.mean():.4f} ({x.std() / len(x) ** 0.5:.3f})" for x in parts), flush=True)


if __name__ == "__main__":
    run_program(main)
