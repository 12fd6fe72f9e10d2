"""The model that a program is given: where it is, and how many updates it had."""

from pathlib import Path

from odelm.errors import InputError
from odelm.files import is_url


def found(name: str) -> Path:
    """Returns the directory of a model by its path, its URL or, if it comes with odelm, its name.

    Raises InputError if there is no such directory, and where a URL cannot be fetched.
    """
    from odelm import checkpoint, remote, shipped

    if is_url(name):
        return remote.fetched(name, checkpoint.to_stderr)
    source = shipped.found(name)
    if not source.is_dir():
        raise InputError(shipped.not_found(source))
    return source


def updates_of(source: Path) -> int | None:
    """Returns how many updates a model had: of a run, at its newest checkpoint; None if that is unknown.

    Raises InputError for a run whose config or checkpoints cannot be read.
    """
    from odelm import bundle, checkpoint_files, interop
    from odelm.run_directory import read_config

    if bundle.is_bundle(source):
        return bundle.updates(source)
    if interop.is_folder(source):
        return None
    read_config(source)  # its errors come before those of the checkpoints
    return checkpoint_files.newest_whole(source)
