"""GLUE's files: read as they are, found in either folder, and every mistake named with its line."""

from pathlib import Path

import numpy as np
import pytest

from odelm.config import TASKS, DataConfig
from odelm.data.glue import read_task, task_folder
from odelm.errors import InputError

SST2 = "sentence\tlabel\na fine film\t1\ndull\t0\n"
SHARED = Path(__file__).parents[4] / "shared" / "data" / "glue"


def write(folder: Path, train: str = SST2, dev: str = SST2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("train.tsv", train), ("dev.tsv", dev)):
        (folder / name).write_text(text, newline="")
    return folder


def read(folder: Path, task: str, **options):
    return read_task(DataConfig(task=task, source=str(folder), **options))


def test_columns_are_found_by_name_and_labels_become_classes(tmp_path):
    rows = "index\tsentence1\tsentence2\tlabel\n0\ta\tb c\tnot_entailment\n1\td\te\tentailment\n"
    train, dev = read(write(tmp_path, rows, rows), "rte")
    assert train.texts == (["a", "d"], ["b c", "e"]) and train.targets.tolist() == [1, 0]
    assert train.targets.dtype == np.int32 and len(dev) == 2


def test_quotation_marks_byte_order_marks_and_line_ends_are_no_part_of_the_format(tmp_path):
    """Quotes open and close nothing; a separator of Unicode's ends no line."""
    rows = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t1\t2\t" He said\tso "" he\u2028did\r\n\r\n'
    train, _ = read(write(tmp_path, rows, rows), "mrpc")
    assert train.texts == (['" He said'], ['so "" he\u2028did']) and train.targets.tolist() == [1]


def test_cola_has_no_header(tmp_path):
    train, _ = read(write(tmp_path, "gj04\t1\t\tHe left.\n", "gj04\t0\t*\tLeft he.\n"), "cola")
    assert train.texts == (["He left."],) and train.targets.tolist() == [1]


def test_a_regression_has_numbers(tmp_path):
    rows = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t5.000\n1\tc\td\t2.5\n"
    train, _ = read(write(tmp_path, rows, rows), "stsb")
    assert train.targets.tolist() == [5.0, 2.5] and train.targets.dtype == np.float32


@pytest.mark.parametrize("name", ["SST-2", "sst2", "Sst_2"])
def test_the_folder_of_a_task_is_found_in_that_of_all(tmp_path, name):
    write(tmp_path / name)
    write(tmp_path / "RTE")
    assert task_folder(DataConfig(task="sst2", source=str(tmp_path))).name == name
    assert len(read(tmp_path, "sst2")[0]) == len(read(tmp_path / name, "sst2")[0]) == 2


def test_a_part_of_dev_is_trained_on_if_it_is_asked_for(tmp_path):
    rows = "index\tquestion\tsentence\tlabel\n" + "".join(f"{i}\tq{i}\ts{i}\tentailment\n" for i in range(10))
    write(tmp_path, rows, rows)
    (tmp_path / "train.tsv").unlink()
    with pytest.raises(InputError, match="has no train.tsv.*--config.data.train_share=0.8"):
        read(tmp_path, "qnli")
    train, dev = read(tmp_path, "qnli", train_share=0.7)
    assert (len(train), len(dev)) == (7, 3)
    assert sorted(train.texts[0] + dev.texts[0]) == [f"q{i}" for i in range(10)]
    assert train.texts == read(tmp_path, "qnli", train_share=0.7)[0].texts
    assert train.texts[0] != [f"q{i}" for i in range(7)], "a random part"
    with pytest.raises(InputError, match="0.01 of 10 examples, which leaves a part empty"):
        read(tmp_path, "qnli", train_share=0.01)
    write(tmp_path)
    with pytest.raises(InputError, match="has a train.tsv: leave the option out"):
        read(tmp_path, "sst2", train_share=0.5)


MISTAKES = {
    "column": ("sst2", "text\tlabel\na\t1\n", "train.tsv has no column 'sentence' in its first line"),
    "label column": ("sst2", "sentence\na\n", "no column 'label'"),
    "count": (
        "sst2",
        "sentence\tlabel\na\t1\nb\tc\t0\n",
        "train.tsv, line 3 has 3 columns, expected 2, parted by tabs",
    ),
    "cola": ("cola", "a\t1\tb\n", "train.tsv, line 1 has 3 columns, expected 4"),
    "label": ("sst2", "sentence\tlabel\n\na\t2\n", "train.tsv, line 3 has the label '2'; .*choices: 0, 1"),
    "score": ("stsb", "sentence1\tsentence2\tscore\na\tb\tfive\n", "line 2 has the score 'five', expected a number"),
    "range": ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.5\n", "has the score '5.5', expected a number from 0 to 5"),
    "nan": ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "has the score 'nan'"),
    "no examples": ("sst2", "sentence\tlabel\n", "train.tsv has no examples"),
    "empty": ("sst2", "", "train.tsv has no column"),
    "empty cola": ("cola", "", "train.tsv has no examples"),
}


@pytest.mark.parametrize(("task", "train", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file_is_named(tmp_path, task, train, message):
    valid = {"cola": "a\t1\t\tb\n", "stsb": "sentence1\tsentence2\tscore\na\tb\t1\n"}.get(task, SST2)
    with pytest.raises(InputError, match=message) as caught:
        read(write(tmp_path, train, valid), task)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere, which is not a folder"):
        read(tmp_path / "nowhere", "sst2")
    with pytest.raises(InputError, match="nor a folder for sst2; it has no folders"):
        read(tmp_path, "sst2")
    (tmp_path / "SST").mkdir()
    with pytest.raises(InputError, match="neither a dev.tsv nor a folder for sst2; did you mean 'sst'"):
        read(tmp_path, "sst2")
    write(tmp_path / "SST")
    (tmp_path / "SST" / "dev.tsv").unlink()
    with pytest.raises(InputError, match="dev.tsv cannot be read"):
        read(tmp_path / "SST", "sst2")
    (tmp_path / "SST" / "dev.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(InputError, match="dev.tsv, line 2 is not UTF-8"):
        read(tmp_path / "SST", "sst2")


@pytest.mark.skipif(not SHARED.is_dir(), reason="GLUE is not on this machine")
def test_the_published_files_are_read_whole():
    expected = {
        "cola": (8551, 1043), "mrpc": (3667, 408), "qnli": (4370, 1093), "rte": (2490, 277), "sst2": (67349, 872),
        "stsb": (5749, 1500), "wnli": (635, 71),
    }  # fmt: skip
    found = {name: read(SHARED, name, train_share=0.8 if name == "qnli" else 0.0) for name in TASKS}
    assert {name: tuple(map(len, splits)) for name, splits in found.items()} == expected
    assert all(text for splits in found.values() for split in splits for column in split.texts for text in column)
