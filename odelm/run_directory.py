"""The directory of a training run: the files in it, and whether it holds the run that is asked for.

A run directory holds `config.json`, `tokenizer.json`, `tokens.sha256`, `metrics.jsonl` and `checkpoints/<step>/`.
"""

import contextlib
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tokenizers import Tokenizer

from odelm import tokenizer as tokenizers
from odelm.config import Config, DataConfig, changed_options, from_json, to_json
from odelm.errors import InputError
from odelm.files import whole_characters, write_text

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer.json", "checkpoints"
DAMAGED = "damaged"
"""Holds checkpoints that a resumed run found damaged or unfinished, by their step."""
LOCK = "lock"
"""Locked by the process that trains in the directory, for as long as it lives."""
TOKENS = "tokens.sha256"
"""Holds the digest of the tokens that the run is trained on."""

RESUMABLE_OPTIONS = frozenset(
    {"mesh.data", "mesh.fsdp", "mesh.tensor", "data.data_dir", "data.workers"}
    | {f"train.{name}" for name in ("updates", "eval_every", "eval_batches", "eval_steps", "checkpoint_every")}
    | {f"train.{name}" for name in ("keep", "keep_every", "keep_minutes", "keep_best", "max_nonfinite")}
    | {f"train.{name}" for name in ("log_every", "unroll", "remat", "watch")}
)
"""Options that may change when a run is resumed; a change of any other makes it another run."""


class RunDirectory:
    """A run's directory, which may not exist yet. Nothing is written before `write`."""

    def __init__(self, path: str | Path):
        """Raises InputError if the path, or one of its parents, is a file, if the path is not UTF-8, which Orbax cannot
        write to, or if its `config.json` is invalid."""
        self.path = Path(path)
        whole_characters(f"the workdir {str(path)!r}", str(self.path.absolute()))
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise InputError(f"{existing} is a file, expected a directory for the run")
        self.config = read_config(self.path) if (self.path / CONFIG).exists() else None
        """The config of the run that is in the directory; None if there is none."""
        self._held: TextIO | None = None

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    def check_config(self, config: Config) -> None:
        """Raises InputError if the directory holds a run with other options than `RESUMABLE_OPTIONS` allow."""
        changed = changed_options(self.config, config, RESUMABLE_OPTIONS) if self.config is not None else ()
        if changed:
            raise InputError(
                f"{self.path} holds a run with other options ({'; '.join(changed)}); "
                "give them as they were to resume it, or another --workdir"
            )

    def check_data(self, data: DataConfig, tokenizer: Tokenizer, digest: str) -> None:
        """Raises InputError if the tokenizer, or the digest of the tokens, is not what the run began with."""
        if self.tokenizer.exists() and tokenizers.load(self.tokenizer).to_str() != tokenizer.to_str():
            what = f"config.data.tokenizer={data.tokenizer}" if data.tokenizer else "the text"
            raise InputError(
                f"{what} gives another tokenizer than {self.tokenizer}, with which this run began; "
                "restore it to resume, or give another --workdir to start a new run"
            )
        tokens = self.path / TOKENS
        before = tokens.read_bytes().decode(errors="replace").strip() if tokens.exists() else digest
        if not re.fullmatch("[0-9a-f]{64}", before):
            raise InputError(
                f"{tokens} is damaged, expected 64 hex digits: restore it, or remove it if the text is what it was"
            )
        if before != digest:
            text = f"task {data.task!r}" if data.task else f"corpus {data.corpus!r}"
            raise InputError(
                f"the text of {text} has changed since the run in {self.path} began; "
                "restore it to resume, or give another --workdir to start a new run"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training in the directory while the block runs.

        The system releases the lock when the process ends, however it ends. A directory without a run is locked by
        `write`. Raises InputError if another process has the lock, or if the directory cannot be written.
        """
        try:
            if self.config is not None:
                self._lock()
            yield
        finally:
            if self._held is not None:
                self._held.close()
                self._held = None

    def _lock(self) -> None:
        if self._held is not None:
            return
        try:
            self._held = (self.path / LOCK).open("a")
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process trains in {self.path}; wait for its end, stop it, or give another --workdir"
            ) from error
        except OSError as error:
            if self._held is None:
                raise InputError(f"{self.path} cannot be written ({error}); give another --workdir") from error
            # A file system without locks.

    def write(self, config: Config, tokenizer: Tokenizer, digest: str) -> None:
        """Makes the directory and writes all of its files but the metrics and the checkpoints.

        Raises InputError if they cannot be written.
        """
        try:
            (self.path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            self._lock()
            write_text(self.tokenizer, tokenizer.to_str())
            write_text(self.path / TOKENS, digest + "\n")
            save_config(self.path, config)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error}); give another --workdir") from error


def save_config(workdir: Path, config: Config) -> None:
    """Writes `config.json` of a run."""
    write_text(workdir / CONFIG, to_json(config))


def read_config(workdir: str | Path) -> Config:
    """Returns the validated config of a run directory, or raises InputError."""
    path = Path(workdir) / CONFIG
    if not Path(workdir).is_dir():
        raise InputError(f"{workdir} is not a directory; give the --workdir of a training run")
    if not path.is_file():
        raise InputError(f"{workdir} has no {CONFIG}, so it is not a run; give the --workdir of a training run")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); restore it, or train again") from error
    try:
        return from_json(text)
    except InputError as error:
        if '"model_type"' in text:
            raise InputError(
                f"{workdir} is a Hugging Face folder, not a run; give the --workdir of a training run"
            ) from error
        raise InputError(f"{path}: {error} (a Hugging Face folder would have a model_type)") from error
