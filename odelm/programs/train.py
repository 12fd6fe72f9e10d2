"""Launches pre-training: flags in, `odelm.train` out.

    python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.FIELD=VALUE ...]
    python train.py --workdir=runs/tiny
    python train.py --config=configs/glue.py --workdir=runs/sst2 --seeds=5 [--config.FIELD=VALUE ...]

The first starts a run, or resumes it if it was interrupted; the second resumes one by its own `config.json`. The third
trains five seeds, from `train.seed` on, each in a directory of its own in the workdir (`seed-0`, ...), and writes the
mean and the spread of what they reach to `results.json` and `results.png` in it. A recipe
is a file or one of the project's by its name, such as `--config=tiny`. Every option of a recipe can be overridden by
its path, such as `--config.train.updates=1000` or `--config.data.corpus=text --config.data.source=my_texts`.

Ctrl-C or SIGTERM ends the run after the current update, with a checkpoint and the status 130 or 143; a second one ends
it at once.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from odelm.config import Config, load_recipe, replace
from odelm.config.describe import as_help
from odelm.errors import InputError
from odelm.files import is_url
from odelm.interrupts import status_of
from odelm.programs import command_line
from odelm.programs.joining import joined

FLAGS = command_line.new_flags()
flags.DEFINE_string(
    "config", None, "The recipe: a file, or a name such as tiny; without it, that of the workdir.", flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "override", [], "An option as PATH=VALUE, the same as --config.PATH=VALUE.", flag_values=FLAGS
)
flags.DEFINE_string(
    "workdir",
    None,
    help="Directory of the run: metrics, checkpoints, tokenizer; or a URL that fsspec knows, such as s3://bucket/run, "
    "to which they are copied.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "seeds",
    None,
    "Train so many seeds, from train.seed on, one after the other, each in a directory of its own in the workdir, and "
    "report their mean and spread.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of the job first, the same command on each host. Slurm, Open MPI, Kubernetes and Cloud "
    "TPU say which process is which; elsewhere give the three flags below.",
    flag_values=FLAGS,
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for --distributed.", flag_values=FLAGS)
flags.DEFINE_integer("num_processes", None, "How many processes there are, for --distributed.", flag_values=FLAGS)
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, for --distributed.", flag_values=FLAGS)
flags.DEFINE_integer(
    "profile",
    0,
    "Trace so many updates, from the fourth on, with jax.profiler into profile/ in the workdir.",
    lower_bound=0,
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "wandb",
    "",
    'A project of Weights & Biases that metrics go to as well. Takes `pip install ".[wandb]"`.',
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "slice",
    None,
    "A slice of TPUs, such as v5e:16x16, v5p:8x8x8 or v6e:4x4: prints what each chip would need for the recipe's "
    'updates, compiled for it without one, and trains nothing. Takes `pip install ".[slice]"`.',
    flag_values=FLAGS,
)
flags.register_validator(
    "workdir", lambda value: value != "", message="is empty, expected a directory", flag_values=FLAGS
)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 for a finished run, 130 or 143 for an interrupted one, 1 for one that cannot continue,
    2 for a mistake."""
    options = f"Options of a recipe, with their defaults (docs/options.md):\n{as_help(Config())}"
    less_memory = (
        "try a smaller --config.train.batch_size or --config.train.length, --config.train.accumulate or "
        "--config.train.remat, or a device with more memory; the same command resumes"
    )
    return command_line.run(_train, FLAGS, arguments, __doc__ or "", options, less_memory=less_memory)


def _train() -> int:
    if FLAGS.slice is not None:
        return _tell_needs(FLAGS.slice)
    if FLAGS.workdir is None:
        raise InputError("--workdir is missing: give a directory for the run, such as --workdir=runs/tiny")
    workdir = FLAGS.workdir if is_url(FLAGS.workdir) else os.path.expanduser(FLAGS.workdir)
    if FLAGS.seeds is not None:
        return _train_seeds(workdir)
    config = command_line.overridden(_config(workdir), FLAGS.override)
    from odelm.train.run import train

    with _joined():
        result = train(config, workdir, profile=FLAGS.profile, wandb=FLAGS.wandb)
    return status_of(result.signal) if result.interrupted else 0


def _train_seeds(workdir: str) -> int:
    """Trains each seed to its end, one after the other, and reports all of them."""
    from odelm.evals.seeds import report_seeds, seed_folder, seeds_in
    from odelm.run_directory import CONFIG

    folder = Path(workdir)
    if is_url(workdir) or (folder / CONFIG).exists():
        what = "is a URL" if is_url(workdir) else "holds a run of one seed"
        raise InputError(
            f"--workdir={workdir} {what}, expected with --seeds a directory that holds a run for each seed"
        )
    begun = seeds_in(folder)
    config = _config(str(seed_folder(folder, begun[0])) if begun else workdir)
    config = command_line.overridden(config, FLAGS.override)
    seeds = range(config.train.seed, config.train.seed + FLAGS.seeds)
    if seeds[-1] >= 2**31:
        raise InputError(f"--seeds={len(seeds)} from train.seed {seeds[0]} on goes past 2**31 - 1: give a lower one")
    from odelm.train.run import train

    with _joined():
        for seed in seeds:
            own = seed_folder(folder, seed)
            print(f"seed {seed}, {seed - seeds[0] + 1} of {len(seeds)}, in {own}")
            of_seed = replace(config, {"train.seed": seed})
            result = train(of_seed, own, profile=FLAGS.profile, wandb=FLAGS.wandb)
            if result.interrupted:
                return status_of(result.signal)
        import jax

        if jax.process_index() == 0:
            print(f"written to {report_seeds(folder, seeds)}")
    return 0


def _tell_needs(topology: str) -> int:
    """Prints what a slice of TPUs would need for the recipe."""
    if FLAGS.config is None:
        raise InputError("--slice needs a recipe: give --config, such as --config=configs/decoder_medium.py")
    config = command_line.overridden(load_recipe(FLAGS.config), FLAGS.override)
    from odelm.train.slice import needs, table

    print(table(list(needs(config, topology)), topology, config.train.batch_size * config.train.length))
    return 0


def _joined() -> contextlib.AbstractContextManager[None]:
    """Lets this process be one of several while the block runs, if it was asked to be."""
    return joined(
        distributed=FLAGS.distributed,
        coordinator=FLAGS.coordinator,
        num_processes=FLAGS.num_processes,
        process_id=FLAGS.process_id,
    )


def _config(workdir: str) -> Config:
    """Returns the recipe that is asked for, or that of the run in the workdir."""
    from odelm.run_directory import CONFIG as SAVED
    from odelm.run_directory import read_config

    if FLAGS.config is not None:
        return load_recipe(FLAGS.config)
    if is_url(workdir):
        from odelm import remote

        return read_config(remote.fetched(workdir, print))
    if not os.path.exists(os.path.join(workdir, SAVED)):
        from odelm.evals.seeds import seeds_in

        if seeds := seeds_in(Path(workdir)):
            known = ", ".join(map(str, seeds))
            raise InputError(f"{workdir} holds runs of the seeds {known}: give --seeds={len(seeds)} to resume them")
        raise InputError(
            f"{workdir} holds no run to resume, and there is no --config: give a recipe, such as "
            "--config=configs/tiny.py, to start one"
        )
    return read_config(workdir)
