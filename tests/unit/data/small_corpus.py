"""Documents that are the same in every run, and a config over them. A module of its own name, because a spawned
process imports it by that."""

import io
import json
import lzma
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from odelm.config import SPLITS, Config, replace
from odelm.data.corpus import find_corpus
from odelm.data.sources.documents import Document
from odelm.data.tokens import Split, Stream
from odelm.data.windows import Windows

WORDS = "the a field block depth step time state norm grid solver flows turns adds reads holds to of and in".split()


def documents(count: int) -> list[str]:
    """Returns `count` different texts of 20 to 59 words, from a fixed linear congruence."""
    state, texts = 1, []
    for number in range(count):
        words = []
        for _ in range(20 + number * 7 % 40):
            state = (state * 1103515245 + 12345) % 2**31
            words.append(WORDS[(state >> 16) % len(WORDS)])
        texts.append(f"{number}: {' '.join(words)}.\n")
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def pile_lines(texts_by_set: dict[str, list[str]]) -> str:
    """Returns lines as in the Pile's shards."""
    objects = [
        {"text": text, "meta": {"pile_set_name": name}} for name, texts in texts_by_set.items() for text in texts
    ]
    return "".join(json.dumps(value) + "\n" for value in objects)


def tar_of(members: dict[str, bytes]) -> bytes:
    """Returns a tar of the members in order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def inner_archives(texts: Sequence[str], count: int) -> dict[str, bytes]:
    """Returns `count` archives as in OpenWebText's, by name, that hold the texts in order."""
    cuts = [len(texts) * number // count for number in range(count + 1)]
    return {
        f"openwebtext/urlsf_subset{number:02d}-{number}_data.xz": lzma.compress(
            tar_of({f"{place:07d}.txt": texts[place].encode() for place in range(cuts[number], cuts[number + 1])})
        )
        for number in range(count)
    }


def read(config: Config) -> dict[str, list[Document]]:
    """Returns the documents of each split, prepared first if they are not."""
    corpus = find_corpus(config.data)
    corpus.prepare()
    return {split: list(corpus.documents(split)) for split in SPLITS}


def texts_of(config: Config) -> list[str]:
    """Returns the texts of both splits, sorted."""
    return sorted(document.text for documents in read(config).values() for document in documents)


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files under a folder, by their names in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def make_config(source: Path, data_dir: Path) -> Config:
    """Returns a config over `source` with a vocabulary of 300, rows of 16 tokens and batches of 4."""
    config = Config()
    config = replace(config, {"data.corpus": "text", "data.source": str(source), "data.data_dir": str(data_dir)})
    config = replace(config, {"data.valid_fraction": 0.2})
    config = replace(config, {"model.vocab_size": 300})
    config = replace(config, {"train.length": 16, "train.batch_size": 4})
    return config


def each_window(windows: Windows) -> list[np.ndarray]:
    batch = windows.batch(np.arange(len(windows)))
    return [window[:count] for window, count in zip(batch["window"], batch["count"], strict=True)]


def flat(split: Split) -> np.ndarray:
    """Returns all tokens of a split, one component after the other."""
    return np.concatenate([stream.tokens[:] for stream in split.values()])


def split_of(tokens: np.ndarray) -> Split:
    """Returns tokens as the one component of a split, in documents that end with token 1, the end of text."""
    ends = np.flatnonzero(tokens == 1) + 1
    return {"docs": Stream(tokens, np.diff(np.append(ends, len(tokens)), prepend=0))}
