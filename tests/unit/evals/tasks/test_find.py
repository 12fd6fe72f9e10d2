"""Tasks by name, file and folder, and mistakes in them told with the file and the line."""

import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest
import zstandard

from odelm.errors import InputError
from odelm.evals.tasks.find import find_tasks
from odelm.evals.tasks.items import Page, Passage, Question, SentencePair

QUESTION = {"query": "a", "choices": ["b", "c"], "label": 0}
PAIR = {"sentence_good": "Cats are.", "sentence_bad": "Cats is."}
WIKI = " \n = One = \n \n a b , c . \n \n = = Part = = \n \n d @-@ e \n \n = Two ( x ) = \n \n f 's \n"


def jsonl(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def data(tmp_path) -> Path:
    """Returns a folder with a file of every published kind."""
    files = {
        "lambada/lambada_test.jsonl": jsonl({"text": "the end is near"}, {"text": "all is well"}),
        "lambada/a_train.jsonl": jsonl({"text": "not this one"}),
        "piqa/dev.jsonl": jsonl(*[{"goal": "g", "sol1": "a", "sol2": "b"}] * 2),
        "piqa/dev-labels.lst": "0\n1\n",
        "arc/arc_easy_validation.csv": 'Which?,a,b,c,d,C\n"Two\nlines, here?",e,f,,,B\nNone?,,,,,1\nNo?,g,h,i,j,4\n',
        "arc/ARC-Challenge/test.jsonl": jsonl(
            {"question": {"stem": "W?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
             "answerKey": "A"}),
        "wikitext2/wiki.valid.tokens": WIKI,
        "own/passages.txt": "one two three\n\nfour five\n",
        "own/questions.jsonl": jsonl(QUESTION) + "\n" + jsonl(QUESTION),
        "pairs/first.jsonl": jsonl(PAIR, PAIR),
        "pairs/second.jsonl": jsonl(PAIR),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "hellaswag").mkdir()
    record = {"query": "q", "endings": ["a", "b"], "label": 1}
    (tmp_path / "hellaswag/hellaswag_val.jsonl.xz").write_bytes(lzma.compress(jsonl(record, record, record).encode()))
    (tmp_path / "blimp").mkdir()
    with tarfile.open(tmp_path / "blimp/blimp.tar.xz", "w:xz") as archive:
        for name in ("data/.hidden.jsonl", "data/island.jsonl", "data/gap.jsonl", "README.md"):
            content = jsonl(PAIR, PAIR).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return tmp_path


NAMED = {
    "lambada": ("lambada", Passage, 2),
    "piqa": ("piqa", Question, 2),
    "arc_easy": ("arc_easy", Question, 3),
    "arc_challenge": ("arc_challenge", Question, 1),
    "wikitext2": ("wikitext2", Page, 2),
    "hellaswag": ("hellaswag", Question, 3),
}


@pytest.mark.parametrize("name, expected", NAMED.items(), ids=NAMED)
def test_a_named_task_is_found_in_its_folder(data, name, expected):
    (task,) = find_tasks([name], data)
    assert (task.name, task.kind, len(task.items)) == expected and task.group is None


def test_pairs_of_sentences_are_a_group_by_paradigm(data):
    tasks = find_tasks(["blimp"], data)
    assert [(task.name, task.group, len(task.items)) for task in tasks] == [
        ("blimp/island", "blimp", 2),
        ("blimp/gap", "blimp", 2),
    ]
    folder = find_tasks([str(data / "pairs")], data)
    assert [(task.name, task.group, task.kind) for task in folder] == [
        ("pairs/first", "pairs", SentencePair),
        ("pairs/second", "pairs", SentencePair),
    ]


def test_arc_is_both_of_its_sets_and_its_csv_is_read(data, capfd):
    easy, challenge = find_tasks(["arc"], data)
    assert (easy.name, challenge.name) == ("arc_easy", "arc_challenge")
    assert easy.items == [
        Question("Question: Which?\nAnswer:", ("a", "b", "c", "d"), 2),
        Question("Question: Two\nlines, here?\nAnswer:", ("e", "f"), 1),
        Question("Question: No?\nAnswer:", ("g", "h", "i", "j"), 3),
    ]
    assert "arc_easy_validation.csv: questions without choices are left out: 1" in capfd.readouterr().err


def test_labels_in_a_file_beside_the_questions_are_read(data):
    prompt, choices = "Question: g\nAnswer:", ("a", "b")
    assert find_tasks(["piqa"], data)[0].items == [Question(prompt, choices, 0), Question(prompt, choices, 1)]


def test_files_are_found_by_path_and_in_the_folder_of_data(data):
    by_path = find_tasks([str(data / "own/questions.jsonl")], Path("/nowhere"))
    in_data = find_tasks(["own/questions.jsonl", "own/passages.txt", "own/passages.txt"], data)
    assert [task.name for task in by_path] == ["questions"]
    assert [(task.name, len(task.items)) for task in in_data] == [("questions", 2), ("passages", 2)]
    assert in_data[1].items[1] == Passage("four", " five")


def test_a_limit_takes_the_first_items_of_each_file(data):
    found = find_tasks(["lambada", "blimp"], data, limit=1)
    assert [len(task.items) for task in found] == [1, 1, 1]
    assert found[0].items[0] == Passage("the end is", " near")


REAL = Path(__file__).parents[5] / "shared" / "data"
PUBLISHED = {"lambada": 5153, "blimp": 67 * 1000, "hellaswag": 10_042, "piqa": 1838, "arc": 570 - 21, "wikitext2": 60}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the published files are not in {REAL}")
@pytest.mark.parametrize("name, items", PUBLISHED.items())
def test_the_published_files_are_read_whole(name, items):
    assert sum(len(task.items) for task in find_tasks([name], REAL)) == items


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def archive_of(*names: str, kind: str = "w") -> bytes:
    """Returns a tar with a file of 300 different pairs by each name."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=kind) as archive:
        for place, name in enumerate(names):
            content = jsonl(*(PAIR | {"number": hash((place, i))} for i in range(300))).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return data.getvalue()


PLAIN, PACKED = archive_of("a.jsonl", "b.jsonl"), archive_of("a.jsonl", "b.jsonl", kind="w:gz")
SECOND = len(archive_of("a.jsonl").rstrip(b"\0")) // 512 * 512 + 512
"""Where in `PLAIN` the second file begins."""

BAD = {
    "not JSON": ("own.jsonl", jsonl(QUESTION) + "{'a'\n", "own.jsonl, line 2 is not JSON"),
    "another format": ("own.jsonl", jsonl(QUESTION, {"text": "a b"}), "own.jsonl, line 2 has no query, choices, label"),
    "no object": ("own.jsonl", jsonl(QUESTION) + "3\n", "line 2 has no query"),
    "label": ("own.jsonl", jsonl(QUESTION, QUESTION | {"label": 2}), "line 2 has the label 2, expected 0 to 1"),
    "no format": ("own.jsonl", jsonl({"a": 1}), "own.jsonl, line 1 has the fields a, which is no format"),
    "empty": ("own.jsonl", "\n\n", "own.jsonl has no items"),
    "not UTF-8": ("own.jsonl", jsonl(QUESTION).encode() + b'{"query": "\xff"}', "own.jsonl, line 2 is not UTF-8"),
    "columns": ("arc.csv", "a,b,A\n", "arc.csv, line 1 has 3 columns"),
    "answer": ("arc.csv", "Which?,a,b,A\nWhich?,a,b,E\n", "arc.csv, line 2 has the answer 'E', expected one of A, B"),
    "empty choice": ("arc.csv", "Which?,a,,c,C\n", "arc.csv, line 1 has the choices ['a', '', 'c'], expected two"),
    "quotes": ("arc.csv", 'Which?,"a"x,b,A\n', "arc.csv, line 1 is not CSV"),
    "passage": ("own.txt", "two words\nword\n", "own.txt, line 2 has a text without a last word"),
    "ending": ("own.yaml", "a", "own.yaml is no file of a task; expected one of .jsonl"),
    "archive cut in a file": ("own.tar", PLAIN[: SECOND // 2], "own.tar cannot be read to its end"),
    "archive cut between files": ("own.tar", PLAIN[:SECOND], "own.tar cannot be read to its end"),
    "compressed archive cut": ("own.tgz", PACKED[: len(PACKED) // 2], "own.tgz cannot be read to its end"),
    "two files of one name": ("own.tar", archive_of("x/a.jsonl", "y/a.jsonl"), "two files that give a task a: rename"),
    "no file of a task": ("own.tar", archive_of("a.csv"), "own.tar has no file of JSON lines"),
    "half a character": (
        "arc.jsonl", '{"question": "\\ud800", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}',
        'arc.jsonl, line 1 has a text that cannot be tokenised: "question" is not UTF-8',
    ),
    "long label": ("own.jsonl", jsonl(QUESTION | {"label": "9" * 5000}), "line 1 has the label '999"),
    "archive": ("own.tar.gz", b"\x1f\x8b00", "own.tar.gz cannot be read to its end"),
}  # fmt: skip


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_a_bad_file_is_told_with_its_line(tmp_path, name, content, message):
    with pytest.raises(InputError) as error:
        find_tasks([write(tmp_path / name, content)], tmp_path)
    assert message in str(error.value)


def test_labels_that_end_early_are_told(data):
    (data / "piqa/dev-labels.lst").write_text("0\n")
    with pytest.raises(InputError, match=r"dev.jsonl, line 2 has the label 'none', expected the index"):
        find_tasks(["piqa"], data)


def test_labels_without_a_question_are_told(data):
    with (data / "piqa/dev-labels.lst").open("a") as labels:
        labels.write("1\n")
    with pytest.raises(InputError, match=r"dev-labels.lst, line 3 is a label without a question"):
        find_tasks(["piqa"], data)


def test_an_archive_may_be_compressed_with_zstd(tmp_path):
    path = write(tmp_path / "own.tar.zst", zstandard.compress(PLAIN))
    assert [(task.name, len(task.items)) for task in find_tasks([path], tmp_path)] == [
        ("blimp/a", 300),
        ("blimp/b", 300),
    ]


def test_what_is_not_there_is_told(data, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for names, folder, message in [
        (["lamabda"], data, "'lamabda' is neither a task nor a file; did you mean 'lambada'?"),
        (["lambada"], empty, "has no file of the task lambada: name its parent by --data"),
        (["arc"], empty, "has no file of the task arc"),
        ([str(empty)], data, "has no file of a task"),
        ([], data, "no task is named"),
    ]:
        with pytest.raises(InputError) as error:
            find_tasks(names, folder)
        assert message in str(error.value)


def test_two_files_of_one_name_are_refused(data):
    (data / "questions.jsonl").write_text(jsonl(QUESTION))
    with pytest.raises(InputError, match="both give a task questions: rename one of them"):
        find_tasks(["questions.jsonl", "own/questions.jsonl"], data)


def test_pages_are_cut_at_titles_and_detokenised(data):
    first, second = find_tasks(["wikitext2"], data)[0].items
    assert first == Page(" = One =\n\na b, c.\n\n== Part ==\n\nd-e\n\n", 18)
    assert second == Page(" = Two (x) =\n\nf's\n", 10)
