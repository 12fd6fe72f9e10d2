"""A preparation that was stopped, in whatever way and place, goes on to what an uninterrupted one makes."""

import collections
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_corpus import documents, files_of, make_config, write_jsonl

from odelm.config import Config, replace, to_json
from odelm.data import corpus, shards
from odelm.data import prepare as prepare_module
from odelm.data.corpus import find_corpus
from odelm.data.prepare import prepare, write_token_shard
from odelm.data.shards import record_writer
from odelm.data.sources import document_shards
from odelm.data.tokens import Prepared
from odelm.errors import InputError

ROOT = Path(__file__).parents[3]
PARTS = 6


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    """Six parts and about ten units of a corpus of 20 kB."""
    monkeypatch.setattr(document_shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 2000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    texts = documents(120)
    for number in range(PARTS):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", texts[number::PARTS] + texts[:3])
    return tmp_path / "in"


@pytest.fixture
def config(source: Path, tmp_path: Path) -> Config:
    return make_config(source, tmp_path / "cache")


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of tokens of an uninterrupted preparation."""
    return stored(prepare(make_config(source, tmp_path / "elsewhere")))


def stored(prepared: Prepared) -> dict[str, bytes]:
    return {f"{prepared.directory.name}/{name}": data for name, data in files_of(prepared.directory).items()}


def interrupting(function: Callable, call: int, error: BaseException | None = None) -> Callable:
    """Returns the function with a KeyboardInterrupt in its place at one of its calls, counted from 0."""
    calls = iter(range(10**9))

    def interrupted(*arguments, **options):
        if next(calls) == call:
            raise error or KeyboardInterrupt
        return function(*arguments, **options)

    return interrupted


def only_whole(data_dir: Path) -> bool:
    """Tells whether nothing under a data directory can be taken for whole."""
    kept = [path.name for kind in ("corpora", "tokens") for path in (data_dir / kind).glob("*")]
    return all(name.endswith(".partial") or name == ".locks" for name in kept)


@pytest.mark.parametrize("call", [0, 1, 25, 70, 137])
def test_interrupted_in_a_part(config: Config, expected, monkeypatch, call: int):
    """Of 138 documents, copies counted, in six parts."""
    written = collections.Counter()

    def counting(job):
        document_shards.write_document_shard(job)
        written[job.number] += 1

    monkeypatch.setattr(corpus, "write_document_shard", counting)
    with monkeypatch.context() as patch:
        patch.setattr(document_shards, "digest", interrupting(document_shards.digest, call))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert only_whole(Path(config.data.data_dir)) and sum(written.values()) == call // 23
    assert stored(prepare(config)) == expected
    assert written == {number: 1 for number in range(PARTS)}, "a finished part is not made again"


@pytest.mark.parametrize("call", [0, 1, 60, 119])
def test_interrupted_in_tfds(config: Config, expected, monkeypatch, call: int):
    with monkeypatch.context() as patch:
        patch.setattr(document_shards, "_document", interrupting(document_shards._document, call))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert only_whole(Path(config.data.data_dir))
    monkeypatch.setattr(corpus, "write_document_shard", lambda job: pytest.fail("a finished part is made again"))
    assert stored(prepare(config)) == expected


@pytest.mark.parametrize("call", [0, 1, 5, 9])
def test_interrupted_in_a_unit(config: Config, expected, monkeypatch, call: int):
    written = collections.Counter()

    def counting(shard):
        write_token_shard(shard)
        written[shard.path] += 1

    monkeypatch.setattr(prepare_module, "write_token_shard", counting)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "record_writer", interrupting(record_writer, call))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert not [path for path in (Path(config.data.data_dir) / "tokens").glob("text-*") if path.suffix != ".partial"]
    assert sum(written.values()) == call
    assert stored(prepare(config)) == expected
    assert len(written) > 9 and set(written.values()) == {1}, "a finished unit is not made again"


def test_interrupted_again_and_again(config: Config, expected, monkeypatch):
    """Each try gets a little further, through all of its writing."""
    tries = 0
    while True:
        tries += 1
        with monkeypatch.context() as patch:
            for module in (document_shards, prepare_module):
                patch.setattr(module, "record_writer", interrupting(record_writer, 1))
            try:
                prepared = prepare(config)
                break
            except KeyboardInterrupt:
                assert tries < 100
    assert stored(prepared) == expected and tries > 12


def test_interrupted_between_writing_and_naming(config: Config, expected, monkeypatch):
    """What is whole but not yet named so is made again or taken over, and nothing is left over."""
    replace = os.replace
    for call in range(0, 40, 3):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupting(replace, call))
            with contextlib.suppress(KeyboardInterrupt):
                prepare(config)
    assert stored(prepare(config)) == expected
    left = [name for name in files_of(Path(config.data.data_dir)) if ".writing" in name or ".partial" in name]
    assert not left


def test_several_processes_make_the_same_bytes(config: Config, expected):
    assert stored(prepare(config, workers=2)) == expected


def start(config: Config, seconds: float) -> subprocess.Popen:
    """Starts to prepare in a process of its own, a little slower."""
    script = (
        "import sys, time; from odelm.config import from_json; from odelm.data import corpus, prepare\n"
        "from odelm.data.sources import document_shards\n"
        f"document_shards.SHARD_BYTES = {document_shards.SHARD_BYTES}\n"
        f"prepare.SHARD_BYTES = {prepare_module.SHARD_BYTES}\n"
        "def slow(function):\n"
        f"    return lambda job: (time.sleep({seconds}), function(job))\n"
        "corpus.write_document_shard = slow(corpus.write_document_shard)\n"
        "prepare.write_token_shard = slow(prepare.write_token_shard)\n"
        "prepare.prepare(from_json(sys.argv[1]))\n"
    )
    return subprocess.Popen([sys.executable, "-c", script, to_json(config)], cwd=ROOT, stderr=subprocess.DEVNULL)


@pytest.mark.thorough
def test_killed_twice(config: Config, expected):
    """Once in the parts and once in the units, by a signal that nothing can catch."""
    data_dir = Path(config.data.data_dir)
    kept = {}
    for pattern in ("corpora/*.partial/parts/00002.json", "tokens/*.partial/result/train/00003.json"):
        process = start(config, 0.05)
        deadline = time.monotonic() + 120
        while not list(data_dir.glob(pattern)):
            assert process.poll() is None and time.monotonic() < deadline, "it ended before it was killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        tokens_made = [path for path in (data_dir / "tokens").glob("text-*") if path.suffix != ".partial"]
        assert not tokens_made
        kept = {path: path.stat().st_mtime_ns for path in (data_dir / "tokens").rglob("*.json")}
    assert kept
    prepared = prepare(config)
    assert stored(prepared) == expected
    for path, time_ns in kept.items():
        moved = prepared.directory / path.relative_to(next(p for p in path.parents if p.name == "result"))
        assert moved.stat().st_mtime_ns == time_ns, "a finished unit was made again"


@pytest.mark.thorough
def test_two_processes_at_once_agree(config: Config, expected, monkeypatch):
    processes = [start(config, 0.01) for _ in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    monkeypatch.setattr(prepare_module, "write_token_shard", None)
    assert stored(prepare(config)) == expected
    assert not list(Path(config.data.data_dir).rglob("*.partial"))


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Lets a write beyond `size` bytes of a file fail, as on a full disk. (Python ignores the signal.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {"parts": (100_000, 1 << 30), "TFDS": (200_000, 1), "tokens": (100_000, 1 << 30)}
"""By what is too large for the disk: the room for a file, and the size of parts. An ArrayRecord has blocks of 64 kB."""


@pytest.mark.parametrize("stage", FULL)
def test_a_full_disk_is_said_and_gone_on_from(tmp_path: Path, monkeypatch, stage: str):
    room, shard_bytes = FULL[stage]
    monkeypatch.setattr(document_shards, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 1 << 30)
    (tmp_path / "in").mkdir()
    for number in range(4):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", documents(800)[number::4])
    configs = [make_config(tmp_path / "in", tmp_path / name) for name in ("whole", "cache")]
    whole, config = (replace(config, {"data.tokenizer_bytes": 10_000}) for config in configs)
    whole = prepare(whole)
    if stage == "tokens":
        find_corpus(config.data).prepare()
    with files_of_at_most(room), pytest.raises(InputError) as caught:
        prepare(config)
    message = str(caught.value)
    folder = tmp_path / "cache" / ("tokens" if stage == "tokens" else "corpora")
    assert f"{folder} cannot be written" in message and "make room" in message and "\n" not in message
    made = [path for path in folder.glob("text-*") if path.suffix != ".partial"]
    assert not made and not (stage != "tokens" and (tmp_path / "cache" / "tokens").exists())
    kept = list((tmp_path / "cache").rglob("*.partial/parts/*.json"))
    assert len(kept) == {"parts": 0, "TFDS": 4, "tokens": 0}[stage]
    monkeypatch.setattr(
        corpus, "write_document_shard", document_shards.write_document_shard if stage == "parts" else None
    )
    assert stored(prepare(config)) == stored(whole)


def _killed(job: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported_in_one_line():
    with pytest.raises(InputError, match="a worker process was killed.*fewer workers"):
        shards.run_jobs(_killed, [0, 1], workers=2, what="nothing", total=2)
