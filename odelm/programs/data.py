"""Prepares a corpus for training, and shows what training will read.

python -m odelm.data prepare --corpus=pile --source=DIR --data_dir=DIR [--tokenizer=FILE|--vocab_size=N] [--workers=N]
python -m odelm.data show --corpus=pile --source=DIR --data_dir=DIR --kind=encoder --mask_unit=span
python -m odelm.data show --workdir=runs/tiny
"""

import argparse
import dataclasses
import itertools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from rich.console import Console

from odelm import tokenizer as tokenizers
from odelm.config import MASK_UNITS, ON_BAD_RECORD, PACKINGS, Config, DataConfig, ModelConfig, replace
from odelm.data import summary
from odelm.data.loader import eval_batches, train_batches
from odelm.data.prepare import prepare
from odelm.data.tokens import Prepared
from odelm.errors import InputError
from odelm.programs.command_line import told_in_one_line
from odelm.run_directory import TOKENIZER, read_config

DEFAULTS = DataConfig()
VOCAB_SIZE, WIDTH = 16_384, 120


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status; a mistake is one line on stderr and status 2."""
    options = _parser().parse_args(arguments)
    return told_in_one_line(lambda: options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m odelm.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("prepare", help="documents to token shards; resumes where it was interrupted")
    make.set_defaults(run=_prepare)
    show = commands.add_parser("show", help="a summary of a prepared corpus, and batches of it as text")
    show.set_defaults(run=_show)
    for command in (make, show):
        _add_data_options(command)
    make.add_argument("--beam_runner", help="read the files with Apache Beam, by this runner, such as DirectRunner")
    make.add_argument("--beam_options", default="", help="its options: name=value,name=value")
    show.add_argument("--workdir", help="a run directory, whose options are used in place of those given here")
    show.add_argument("--kind", default="decoder", choices=("decoder", "encoder"))
    show.add_argument("--sentence_order", action="store_true", help="encoder: pairs of segments, swapped or not")
    show.add_argument("--packing", default=DEFAULTS.packing, choices=PACKINGS)
    show.add_argument("--mask_unit", default=DEFAULTS.mask_unit, choices=MASK_UNITS)
    show.add_argument("--weights", default=(), type=_list(float), help="a share for each of --components")
    show.add_argument("--split", default="train", choices=("train", "validation"))
    show.add_argument("--length", type=int, default=128, help="tokens a row")
    show.add_argument("--batch_size", type=int, default=4, help="rows a batch")
    show.add_argument("--batches", type=_natural, default=1)
    show.add_argument("--start", type=_natural, default=0, help="the update whose batch is the first one shown")
    show.add_argument("--seed", type=int, default=0)
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", default=DEFAULTS.corpus, help="python_source, text, openwebtext, pile, tfds:NAME")
    parser.add_argument("--source", default="", help="the file, folder or glob that it is made from")
    parser.add_argument("--data_dir", default=DEFAULTS.data_dir, help="where it is kept (%(default)s)")
    parser.add_argument("--tokenizer", default="", help="a tokenizer.json; else a byte-level BPE is trained")
    parser.add_argument("--end_token", default="", help="its token that ends a document, if not one of the usual names")
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE, help="of a trained tokenizer (%(default)s)")
    parser.add_argument(
        "--tokenizer_bytes", type=int, default=DEFAULTS.tokenizer_bytes, help="text that it is trained on"
    )
    parser.add_argument("--valid_fraction", type=float, default=DEFAULTS.valid_fraction, help="share held out")
    parser.add_argument("--components", default=(), type=_list(str), help="parts of the corpus to use: A,B")
    parser.add_argument("--exclude", default=(), type=_list(str), help="parts of the corpus to leave out: A,B")
    parser.add_argument("--on_bad_record", default=DEFAULTS.on_bad_record, choices=ON_BAD_RECORD)
    parser.add_argument("--text_field", default=DEFAULTS.text_field, help="of JSON lines and Parquet (%(default)s)")
    parser.add_argument("--text_feature", default=DEFAULTS.text_feature, help="of tfds:NAME")
    parser.add_argument("--workers", type=_natural, default=0, help="processes; 0 is this one, tokenising on all cores")


def _prepare(options: argparse.Namespace) -> int:
    config = _config(options)
    prepared = prepare(config, workers=options.workers, beam=_beam(options))
    _print_corpus(prepared)
    print(f"train on it with: {_flags(config)}")
    return 0


def _show(options: argparse.Namespace) -> int:
    workdir = Path(options.workdir).expanduser() if options.workdir else None
    config = read_config(workdir) if workdir else _config(options)
    tokenizer = workdir / TOKENIZER if workdir else None
    prepared = prepare(config, tokenizer_file=tokenizer, workers=options.workers)
    _print_corpus(prepared)
    if options.split == "train":
        batches = train_batches(prepared, config, start=options.start)
    else:
        batches = itertools.islice(eval_batches(prepared, config), options.start, None)
    number = options.start - 1
    for number, batch in enumerate(itertools.islice(batches, options.batches), options.start):
        shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in batch.items())
        print(f"\n{options.split} batch {number}: {shapes}")
        for row in range(len(batch["tokens"])):
            print(f"{row}: {summary.row_text(prepared.tokenizer, batch, row, end_token=config.data.end_token)}")
    if number < options.start and options.batches:
        raise InputError(f"the {options.split} split has no batch {options.start}: give a lower --start")
    return 0


def _print_corpus(prepared: Prepared) -> None:
    console = Console()
    # Output that is not a terminal has no width to keep to.
    console.width = console.width if console.is_terminal else WIDTH
    console.print(prepared.directory, highlight=False, soft_wrap=True)
    console.print(summary.table(prepared))
    for line in summary.left_out(prepared):
        print(line)


def _config(options: argparse.Namespace) -> Config:
    if options.source and options.corpus == DEFAULTS.corpus:
        raise InputError(f"--source is {options.source!r}, but {options.corpus} has none: give --corpus, such as text")
    names = {field.name for field in dataclasses.fields(DataConfig)} - {"workers"}
    given = {name: value for name, value in vars(options).items() if name in names}
    config = Config(data=DataConfig(**given), model=ModelConfig(vocab_size=options.vocab_size))
    if options.tokenizer:
        size = max(tokenizers.load(options.tokenizer).get_vocab().values()) + 1
        config = replace(config, {"data.vocab_size": None, "model.vocab_size": size})
    if options.run is _show:
        shown = {
            "model.kind": options.kind,
            "model.sentence_order": options.sentence_order,
            "model.token_types": 2 if options.sentence_order else 0,
            "model.max_length": options.length,
            "train.length": options.length,
            "train.batch_size": options.batch_size,
            "train.seed": options.seed,
        }
        config = replace(config, shown)
    return config.validate()


def _beam(options: argparse.Namespace) -> tfds.download.DownloadConfig | None:
    if not options.beam_runner:
        if options.beam_options:
            raise InputError("--beam_options are those of a runner, but there is no --beam_runner")
        return None
    try:
        from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("--beam_runner needs Apache Beam: pip install apache-beam") from error
    flags = [f"--{option}" for option in options.beam_options.split(",") if option]
    return tfds.download.DownloadConfig(beam_runner=options.beam_runner, beam_options=PipelineOptions(flags))


def _flags(config: Config) -> str:
    """Returns the flags of train.py that find what was prepared."""
    changed = {
        field.name: value
        for field in dataclasses.fields(DataConfig)
        if (value := getattr(config.data, field.name)) != getattr(DEFAULTS, field.name)
    }
    flags = [f"--config.data.{name}={value}" for name, value in changed.items()]
    return shlex.join([*flags, f"--config.model.vocab_size={config.model.vocab_size}"])


def _list(kind: type) -> Callable[[str], tuple]:
    """Returns the parser of a value such as A,B."""

    def parts(text: str) -> tuple:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    parts.__name__ = f"list of {kind.__name__}"
    return parts


def _natural(text: str) -> int:
    """Returns a number from 0 to the largest update that the loader can start from."""
    number = int(text)
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to {2**31 - 1}")
    return number
