"""How much adaptive steps depend on what else is in the batch: the same rows together, alone, and with padding.

    python -m benchmarks.adaptive --workdir=runs/tiny --solver=bosh3 --tolerance=0.1

The step sizes of a batch are chosen by the error of all its rows, padding included. Fixed steps have no such choice.
"""

import argparse

import jax
import jax.numpy as jnp

import odelm
from benchmarks import run_program
from odelm.data.loader import held_out_rows
from odelm.data.prepare import prepare

ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a training run")
    parser.add_argument("--solver", default="bosh3")
    parser.add_argument("--tolerance", type=float, default=0.1)
    options = parser.parse_args()
    model, config, _ = odelm.load(options.workdir)
    prepared = prepare(config, tokenizer_file=f"{options.workdir}/tokenizer.json")
    tokens = jnp.asarray(next(held_out_rows(prepared, config, limit=ROWS).batches(ROWS))["tokens"])

    @jax.jit
    def encode(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return model.encode_adaptive(tokens, mask=mask, tolerance=options.tolerance, solver=options.solver)

    everywhere = jnp.ones_like(tokens, bool)
    together, evaluations = encode(tokens, everywhere)
    alone = [encode(tokens[row : row + 1], everywhere[:1]) for row in range(ROWS)]
    print(f"evaluations: {evaluations} together, {[int(count) for _, count in alone]} alone")
    tell("together against alone", model, together, jnp.concatenate([hidden for hidden, _ in alone]))
    half = tokens.shape[1] // 2
    short, evaluations = encode(tokens[:1, :half], everywhere[:1, :half])
    padded, padded_evaluations = encode(tokens[:1].at[:, half:].set(0), everywhere[:1].at[:, half:].set(False))
    print(f"evaluations: {evaluations} for {half} tokens, {padded_evaluations} padded to {2 * half}")
    tell("padded against not", model, padded[:, :half], short)


def tell(what: str, model, hidden: jax.Array, expected: jax.Array) -> None:
    moved = jnp.median(jnp.linalg.norm(hidden - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1))
    same = (model.readout(hidden).argmax(-1) == model.readout(expected).argmax(-1)).mean()
    print(f"{what}: hidden states move by {moved:.2%} (median), another likeliest token at {1 - same:.1%} of places")


if __name__ == "__main__":
    run_program(main)
