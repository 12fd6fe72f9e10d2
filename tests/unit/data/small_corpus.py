"""Documents that are the same in every run, and a config over them. A module of its own name, because a spawned
process imports it by that."""

import json
from pathlib import Path

import numpy as np

from odelm.config import Config
from odelm.data.tokens import Split, Stream

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


def make_config(source: Path, data_dir: Path) -> Config:
    """Returns a config over `source` with a vocabulary of 300, rows of 16 tokens and batches of 4."""
    config = Config()
    config.data.corpus, config.data.source, config.data.data_dir = "text", str(source), str(data_dir)
    config.data.valid_fraction = 0.2
    config.model.vocab_size = 300
    config.train.length, config.train.batch_size = 16, 4
    return config


def flat(split: Split) -> np.ndarray:
    """Returns all tokens of a split, one component after the other."""
    return np.concatenate([stream.tokens[:] for stream in split.values()])


def split_of(tokens: np.ndarray) -> Split:
    """Returns tokens as the one component of a split, in documents that end with token 1, the end of text."""
    ends = np.flatnonzero(tokens == 1) + 1
    return {"docs": Stream(tokens, np.diff(np.append(ends, len(tokens)), prepend=0))}
