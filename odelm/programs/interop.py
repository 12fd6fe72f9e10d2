"""Writes a run as a Hugging Face folder, for `transformers`.

python -m odelm.interop export --workdir=runs/encoder --to=DIR [--step=N]
"""

import argparse
from collections.abc import Sequence

from odelm import interop, pretrained
from odelm.programs.command_line import told_in_one_line


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status; a mistake is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(prog="python -m odelm.interop", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a run as a Hugging Face folder")
    export.add_argument(
        "--workdir", required=True, help="the run directory (or a bundle, or a folder to be written anew)"
    )
    export.add_argument("--to", required=True, help="the folder to make")
    export.add_argument("--step", type=int, help="the checkpoint to write; the newest if left out")
    options = parser.parse_args(arguments)
    return told_in_one_line(lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    model, config, tokenizer = pretrained.load(options.workdir, step=options.step)
    print(interop.export(model, options.to, tokenizer=tokenizer, end_token=config.data.end_token))
    return 0
