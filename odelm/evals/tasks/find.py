"""Finds tasks by name, by file or by folder; a named task's files are looked up in the folder of data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from odelm.errors import InputError, nearest
from odelm.evals.tasks.items import Task
from odelm.evals.tasks.read import KINDS, kind_of, read_file


@dataclass(frozen=True)
class Named:
    """Where the file of a named task is."""

    folder: str
    """Its folder within the folder of data."""
    words: tuple[str, ...] = ()
    """Words that must all be in the file's name, or in the names of its folders."""
    splits: tuple[str, ...] = ()
    """The first of these that is in a file's name is scored; none means all files."""


NAMED = {
    "lambada": Named("lambada", splits=("test", "dev", "val")),
    "blimp": Named("blimp"),
    "hellaswag": Named("hellaswag", splits=("val", "dev")),
    "piqa": Named("piqa", splits=("val", "dev")),
    "arc_easy": Named("arc", ("easy",), splits=("test", "val", "dev")),
    "arc_challenge": Named("arc", ("challenge",), splits=("test", "val", "dev")),
    "wikitext2": Named("wikitext2", splits=("test", "val")),
}
"""The splits are those with published labels; the first is the one that lm-eval scores."""
GROUPS = {"arc": ("arc_easy", "arc_challenge")}
"""Names for several tasks; those of them whose files exist are scored."""


def find_tasks(names: Sequence[str], data: Path, *, limit: int | None = None) -> list[Task]:
    """Returns the tasks that are named: each a name of `NAMED` or `GROUPS`, a file, or a folder of files.

    Args:
        data: the folder with a folder for each named task; files are looked for in it too.
        limit: how many items to take from the beginning of each file; None is all.

    Raises InputError for a name or a file that is not there, for two tasks of one name, and for a file in no known
    format.
    """
    found: dict[str, Task] = {}
    for task in (task for name in names for task in _tasks_of(name, data, limit)):
        other = found.setdefault(task.name, task)
        if other.source != task.source:
            raise InputError(f"{other.source} and {task.source} both give a task {task.name}: rename one of them")
    if not found:
        raise InputError(f"no task is named; expected files, or some of {', '.join([*NAMED, *GROUPS])}")
    return list(found.values())


def _tasks_of(name: str, data: Path, limit: int | None) -> Iterator[Task]:
    if name in GROUPS or name in NAMED:
        yield from _named_tasks(name, data, limit)
        return
    path = next((path for path in (Path(name).expanduser(), data / name) if path.exists()), None)
    if path is None:
        raise InputError(f"{name!r} is neither a task nor a file; {nearest(name, [*NAMED, *GROUPS])}")
    if not path.is_dir():
        yield from read_file(path, limit=limit)
        return
    files = _listed(path)
    if not files:
        raise InputError(f"the folder {path} has no file of a task; expected {', '.join(KINDS)}")
    for file in files:
        yield from read_file(file, limit=limit, group=path.name)


def _named_tasks(name: str, data: Path, limit: int | None) -> Iterator[Task]:
    there = {part: files for part in GROUPS.get(name, (name,)) if (files := _files_of(NAMED[part], data))}
    if not there:
        folder = data / NAMED[GROUPS.get(name, (name,))[0]].folder
        raise InputError(f"{folder} has no file of the task {name}: name its parent by --data, or give a file")
    for part, files in there.items():
        for file in files:
            yield from read_file(file, limit=limit, name=part, group=part)


def _files_of(named: Named, data: Path) -> list[Path]:
    """Returns the files of a named task, none if there are none."""
    folder = data / named.folder
    inside = {file: str(file.relative_to(folder)).lower() for file in _listed(folder)}
    files = [file for file, name in inside.items() if all(word in name for word in named.words)]
    if not named.splits:
        return files
    by_split = ([file for file in files if split in file.name.lower()][:1] for split in named.splits)
    return next((found for found in by_split if found), [])


def _listed(folder: Path) -> list[Path]:
    """Returns the files under a folder that may contain tasks, sorted; none if there is no such folder."""
    there = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [path for path in there if kind_of(path) is not None]
