"""A run directory that lives elsewhere: any file system that fsspec knows, by a URL such as `s3://bucket/runs/a`.

Training works in a directory of this machine. After each checkpoint its files are copied to the URL, a checkpoint's
manifest last, so that it counts there only once it is whole; files no longer kept here are removed there. A machine
that has less than the URL begins by fetching its newest checkpoint whose every byte is right. Nothing keeps two
machines from training at one URL at a time: no lock reaches that far.
"""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from odelm import manifest
from odelm.checkpoint_files import CheckpointFiles
from odelm.config import changed_options, from_json
from odelm.errors import InputError, RunFailure
from odelm.files import fingerprint
from odelm.run_directory import CHECKPOINTS, CONFIG, DAMAGED, LOCK, RESUMABLE_OPTIONS, read_config

CACHE = "~/.cache/odelm/runs"
"""Where runs at URLs are on this machine."""
FETCHING = ".fetching"
"""Holds a checkpoint until it has been fetched whole."""
KEPT_HERE = {CHECKPOINTS, DAMAGED, LOCK, FETCHING, "profile", "wandb"}
"""The parts of a run directory that are not copied, or not as they are."""


def local_copy(url: str) -> Path:
    """Returns the directory of this machine that a run at a URL is trained in, or loaded from."""
    url = url.rstrip("/")
    return Path(CACHE).expanduser() / f"{url.rpartition('/')[2]}-{fingerprint(url)}"


def fetched(url: str, announce: Callable[[str], None]) -> Path:
    """Returns the directory of this machine with the newest whole checkpoint of the run at a URL, after fetching it.

    Raises InputError if there is no run.
    """
    directory = local_copy(url)
    remote = Remote(url, directory, announce)
    if not remote.has_run():
        raise InputError(f"{url} has no {CONFIG}, so it is not a run; give the --workdir of a training run")
    remote.fetch()
    return directory


class Remote:
    """The copy of a run directory at a URL. Its errors are InputError where it is opened or fetched from."""

    def __init__(self, url: str, workdir: Path, announce: Callable[[str], None]):
        self.url, self._workdir, self._announce = url.rstrip("/"), workdir, announce
        self._files = CheckpointFiles(workdir)
        self._failure: Exception | None = None
        self._one = threading.Lock()
        try:
            # Cached listings would hide what another machine has written.
            self._system, self._root = fsspec.url_to_fs(self.url, use_listings_cache=False)
            self._root = self._root.rstrip("/")
        except (ValueError, ImportError) as error:
            raise InputError(f"{url} cannot be opened ({error}); give a directory, or install what it needs") from error

    def has_run(self) -> bool:
        """Returns whether there is a run at the URL."""
        return self._call(lambda: self._system.exists(f"{self._root}/{CONFIG}"))

    def fetch(self) -> None:
        """Brings the newest checkpoint that is whole, and the files beside it, if there is a newer one than here.

        Raises InputError if the URL holds another run than the directory, or cannot be read.
        """
        if not self.has_run():
            return
        names = self._call(self._names)
        here = read_config(self._workdir) if (self._workdir / CONFIG).exists() else None
        if here is not None:
            there = from_json(self._call(lambda: self._system.cat_file(f"{self._root}/{CONFIG}")).decode())
            if changed := changed_options(there, here, RESUMABLE_OPTIONS):
                raise InputError(
                    f"{self.url} holds another run than {self._workdir} ({'; '.join(changed)}); give another --workdir"
                )
        newest = max(self._files.steps(), default=-1)
        steps = sorted((step for step in _sealed(names) if step > newest), reverse=True)
        if not any(self._fetch_checkpoint(step, names) for step in steps) and here is not None:
            return
        for name in names:
            if name.split("/")[0] not in KEPT_HERE:
                self._get(name, self._workdir / name)

    def push(self) -> None:
        """Copies what is new to the URL; a failure is announced, and what failed is tried again the next time."""
        with self._one:
            try:
                self._push()
                self._failure = None
            except Exception as error:
                self._failure = error
                self._announce(f"{self.url} cannot be written ({error}): it is tried again with the next checkpoint")

    def close(self) -> None:
        """Copies what is new; raises RunFailure if that fails."""
        self.push()
        if self._failure is not None:
            raise RunFailure(
                f"{self.url} cannot be written ({self._failure}); the run is whole in {self._workdir}: run the same "
                "command on this machine to try again"
            ) from self._failure

    def _push(self) -> None:
        there = set(self._names())
        mine = [step for step in self._files.steps() if manifest.is_sealed(self._files.directory(step))]
        for path in sorted(self._workdir.rglob("*")):
            name = path.relative_to(self._workdir).as_posix()
            # Files that begin with a dot are being written.
            if path.is_file() and name.split("/")[0] not in KEPT_HERE and not path.name.startswith("."):
                self._put(path, name)
        for step in mine:
            sealed = f"{CHECKPOINTS}/{step}/{manifest.MANIFEST}"
            if sealed in there:
                continue
            files = [path for path in self._files.directory(step).rglob("*") if path.is_file()]
            # The manifest last: with it the checkpoint counts.
            for path in sorted(files, key=lambda path: path.name == manifest.MANIFEST):
                self._put(path, path.relative_to(self._workdir.absolute()).as_posix())
        for step in _sealed(there) - set(mine):
            self._system.rm_file(f"{self._root}/{CHECKPOINTS}/{step}/{manifest.MANIFEST}")
            self._system.rm(f"{self._root}/{CHECKPOINTS}/{step}", recursive=True)

    def _fetch_checkpoint(self, step: int, names: list[str]) -> bool:
        """Fetches a checkpoint, and returns whether it is whole."""
        folder, partial = f"{CHECKPOINTS}/{step}/", self._workdir / FETCHING
        shutil.rmtree(partial, ignore_errors=True)
        for name in names:
            if name.startswith(folder):
                self._get(name, partial / name.removeprefix(folder))
        try:
            manifest.check(partial)
        except manifest.Damaged as damage:
            self._announce(f"checkpoint {step} at {self.url} is damaged, {damage}: it is passed over")
            shutil.rmtree(partial)
            return False
        self._files.root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._files.directory(step), ignore_errors=True)
        partial.rename(self._files.directory(step))
        self._announce(f"fetched checkpoint {step} of {self.url}")
        return True

    def _names(self) -> list[str]:
        """Returns the files at the URL, by their paths from it."""
        found = self._system.find(self._root) if self._system.exists(self._root) else []
        return sorted(name[len(self._root) + 1 :] for name in found)

    def _get(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        self._call(lambda: self._system.get_file(f"{self._root}/{name}", str(partial)))
        os.replace(partial, path)

    def _put(self, path: Path, name: str) -> None:
        self._system.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
        self._system.put_file(str(path), f"{self._root}/{name}")

    def _call(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:
            # Each file system raises errors of its own; nothing is lost if one cannot be read.
            raise InputError(f"{self.url} cannot be read ({error}); give another --workdir") from error


def _sealed(names: Any) -> set[int]:
    """Returns the steps of the checkpoints that have a manifest."""
    parts = (name.split("/") for name in names)
    found = (part[1] for part in parts if len(part) == 3 and part[0] == CHECKPOINTS and part[2] == manifest.MANIFEST)
    return {int(step) for step in found if step.isdecimal()}
