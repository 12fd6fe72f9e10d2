"""The held-out loss over learning rates at several depths and widths, with reference shapes and without.

    python -m benchmarks.rates [--depths=4,8,16] [--widths=32,64,128] [--head_size=16] [--updates=200]
        [--set=PATH=VALUE] [--reference=without,with] [--out=FILE]

The depths are tried at the middle width and the widths at the middle depth, which are also the references. A row is a
shape, a column a factor of the recipe's learning rates, and the lowest loss of a row is marked: where rates carry over,
the marks are below one another. The losses are means over the counts of steps that are evaluated.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from benchmarks import run_program
from benchmarks.options import one_of, positive, several, whole
from benchmarks.variants import Variant
from odelm.config import Config, load_recipe, replace
from odelm.data.prepare import prepare
from odelm.programs.command_line import overridden, use_compilation_cache


def shape(base: Config, depth: int, width: int, reference: tuple[int, int] | None, *, head_size: int) -> Config:
    """Returns the recipe at a depth and a width."""
    options = {"model.depth": depth, "model.width": width, "model.heads": max(width // head_size, 1)}
    if reference is not None:
        options |= dict(zip(("model.reference_depth", "model.reference_width"), reference, strict=True))
    return replace(base, options)


def line(name: str, losses: list[float]) -> str:
    """Returns a row of the table, its lowest loss in bold."""
    cells = [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="the recipe")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="an option of it")
    parser.add_argument("--depths", type=several(whole), default="4,8,16")
    parser.add_argument("--widths", type=several(whole), default="32,64,128")
    parser.add_argument(
        "--factors", type=several(positive), default="0.25,0.5,1,2,4", help="of the recipe's learning rates"
    )
    parser.add_argument("--head_size", type=whole, default=16, help="at every width")
    parser.add_argument("--updates", type=whole, default=200)
    parser.add_argument(
        "--reference", type=several(one_of(("without", "with"))), default="without,with", help="one of them, or both"
    )
    parser.add_argument("--out", type=Path, help="what is found, as JSON, written after each shape")
    options = parser.parse_args()
    use_compilation_cache("~/.cache/odelm/compiled")
    base = replace(overridden(load_recipe(options.config), options.set), {"train.updates": options.updates})
    prepared = prepare(base)
    depths, widths, factors = options.depths, options.widths, options.factors
    middle = depths[len(depths) // 2], widths[len(widths) // 2]
    shapes = list(dict.fromkeys([(depth, middle[1]) for depth in depths] + [(middle[0], width) for width in widths]))
    found: dict[str, list[float]] = {}
    for reference in [{"without": None, "with": middle}[name] for name in options.reference]:
        title = (
            "each shape by itself" if reference is None else f"with depth {middle[0]}, width {middle[1]} as reference"
        )
        print(f"\n| {title} | {' | '.join(f'{factor:g}x' for factor in factors)} |\n|---|{'---|' * len(factors)}")
        for depth, width in shapes:
            variant = Variant("", shape(base, depth, width, reference, head_size=options.head_size), prepared)
            runs = [variant.train(seed=0, factor=factor) for factor in factors]
            losses = [float(np.mean(list(run["loss"].values()))) for run in runs]
            found[f"{title}: {depth} x {width}"] = losses
            print(line(f"depth {depth}, width {width}", losses), flush=True)
            if options.out:
                options.out.write_text(json.dumps({"factors": factors, "loss": found}, indent=1) + "\n")
    kind = dataclasses.asdict(base.optimizer)["kind"]
    print(f"\n{options.updates} updates of {kind}, on {jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    run_program(main)
