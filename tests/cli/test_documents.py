"""What README and docs/ show works as it is printed there: blocks are run, and commands in the text can be parsed."""

import re
import shlex
import shutil
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from flax import nnx

import odelm
from odelm.config import load_recipe
from odelm.models.kernels.layout import MOST_ROWS
from odelm.models.kernels.layout_choice import layout_of
from odelm.programs import command_line, infer
from tests.cli.conftest import ROOT, trained

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (python (?:.*\\\n)*.*)", re.MULTILINE)
INLINE = re.compile(r"`(python [^`]+|make [^`]+)`")
SMALL = [
    "--config.model.width=32", "--config.model.heads=2", "--config.train.length=16", "--config.train.batch_size=4",
    "--config.train.updates=2", "--config.train.eval_batches=2", "--config.train.unroll=false",
    # Each count that is drawn is compiled.
    "--config.step_sampling.kind=fixed", "--config.train.eval_steps=2",
]  # fmt: skip

# The programs of each block of the README that is run, by its first words.
OWN_TEXT = "python train.py --config=configs/tiny.py"
OWN_MODEL = "python infer.py --model=FOLDER"
PROGRAMS = {
    OWN_TEXT: ["train.py", "infer.py", "infer.py"],
    OWN_MODEL: ["infer.py", "train.py", "infer.py", "-m odelm.interop"],
}


def blocks(language: str, *documents: Path) -> list[str]:
    return [text for path in documents for found, text in BLOCK.findall(path.read_text()) if found == language]


def commands(text: str) -> list[list[str]]:
    """Returns the words of each command of a shell block, without comments."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def every_command() -> list[str]:
    """Returns every command that a document or a recipe's docstring shows, as one line."""
    found = []
    for path in [*DOCUMENTS, *RECIPES]:
        text = path.read_text().replace("\\\\\n", "\\\n")
        shown = [shlex.join(words) for block in blocks("", path) for words in commands(block)]
        shown += [" ".join(command.replace("\\\n", " ").split()) for command in INDENTED.findall(text)]
        found += shown + [" ".join(command.split()) for command in INLINE.findall(text)]
    return sorted(set(found))


def test_commands_are_found():
    assert len(every_command()) > 25


@pytest.mark.parametrize("start", PROGRAMS)
def test_a_block_that_is_run_has_the_programs_that_its_test_expects(start):
    """Running the blocks is left out of `make test`: what a change of the README does to them is seen there."""
    (block,) = [block for block in blocks("", ROOT / "README.md") if block.startswith(start)]
    programs = [" ".join(words[: 2 if words[0] == "-m" else 1]) for _, *words in commands(block)]
    assert programs == PROGRAMS[start]


@pytest.mark.parametrize("command", every_command())
def test_a_command_that_is_shown_can_be_given(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(command.partition(" > ")[0])
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets or "=" in word for word in arguments)
        return
    assert program == "python", f"{command} is not one of ours"
    name, *arguments = arguments
    if name == "-m" or name.startswith("benchmarks/"):
        check_module(*arguments if name == "-m" else [name.removesuffix(".py").replace("/", "."), *arguments])
        return
    check_flags(name, arguments)


def check_flags(name: str, arguments: list[str]) -> None:
    """Checks the arguments of a program whose flags are absl's."""
    flags = import_module(f"odelm.programs.{name.removesuffix('.py')}").FLAGS
    if "--help" in arguments:
        return
    given = [argument for argument in arguments if not argument.startswith("[")]
    command_line.parse(flags, given if name != "train.py" else [*given, "--workdir=needed"])
    if name == "train.py" and flags.config:
        command_line.overridden(load_recipe(flags.config), flags.override)


def check_module(name: str, *arguments: str) -> None:
    assert find_spec(name), name
    if name == "odelm.evals":
        return check_flags("evals", list(arguments))
    if name == "odelm.evals.harness":
        return  # its flags are lm-eval's
    programs = {"odelm.data": ROOT / "odelm/programs/data.py", "odelm.interop": ROOT / "odelm/programs/interop.py"}
    source = programs.get(name, ROOT / f"{name.replace('.', '/')}.py")
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
            known = f'"{flag}"' in source.read_text() if source.is_file() else False
            assert known, f"{name} has no {flag}"


def most_rows(width: int) -> int:
    """Returns how many rows of a model the kernels decode."""
    shape = odelm.ModelConfig(kind="decoder", vocab_size=64, width=width, heads=width // 64, depth=1, max_length=1024)
    plan = odelm.CausalLM(shape, rngs=nnx.Rngs(0)).plan(steps=1)
    return max(rows for rows in range(1, MOST_ROWS + 1) if layout_of(shape, plan, 512, rows=rows).fits)


def test_the_most_rows_of_kernels_are_those_that_are_named():
    texts = {path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "CHANGELOG.md")}
    texts |= {"inference.md": (ROOT / "docs/inference.md").read_text(), "--kernel": str(infer.FLAGS["kernel"].help)}
    usual, wide = most_rows(896), most_rows(1024)
    for name, text in texts.items():
        assert re.findall(r"up to (\d+) rows(?:[ (;]+(\d+) at width 1,024)?", text) == [(str(usual), str(wide))], name


def test_the_layout_in_the_readme_is_that_of_the_project():
    (layout,) = blocks("text", ROOT / "README.md")
    named = re.findall(r"[\w/]+(?:\.py|/)(?=[\s,])", re.sub(r"`[^`]*`", "", layout))
    folder = ROOT / "odelm"
    missing = [name for name in named if not (ROOT / name).exists() and not any(folder.rglob(name.strip("/")))]
    assert len(named) > 20 and not missing
    shown = {name.removeprefix("odelm/").strip("/") for name in named}
    there = {path.name for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - shown - {"__init__.py"} == set(), "has no place in the layout"


@pytest.mark.parametrize("block", blocks("python", ROOT / "README.md"))
def test_python_in_the_readme_runs(block):
    scope: dict = {}
    exec(block, scope)
    assert scope["logits"].shape == (1, 16, 2048)


def test_python_in_the_document_of_data_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "downloads" / "openwebtext"
    texts.mkdir(parents=True)
    lines = [f'{{"text": "document {number}"}}\n' for number in range(200)]
    (texts / "openwebtext.jsonl").write_text("".join(lines))
    (block,) = blocks("python", ROOT / "docs" / "data.md")
    scope: dict = {}
    exec(block, scope)
    assert scope["builder"].info.splits["train"].num_examples > 100


@pytest.fixture
def readme(call, corpus, tmp_path, monkeypatch) -> Callable[[str, dict[str, str]], list[str]]:
    """Returns a function that runs the block of the README that begins with a command, and returns what it printed.

    Names in capitals stand for the user's own.
    """
    shutil.copytree(ROOT / "configs", tmp_path / "configs")

    def run(start: str, names: dict[str, str]) -> list[str]:
        monkeypatch.chdir(tmp_path)
        (block,) = [block for block in blocks("", ROOT / "README.md") if block.startswith(start)]
        printed = []
        for _, *words in commands(block):
            arguments = [
                re.sub(r"\b[A-Z_]{4,}\b", lambda name: names.get(name[0], name[0]), argument) for argument in words
            ]
            name = arguments.pop(0)
            if name == "-m":
                name = arguments.pop(0).removeprefix("odelm.")
            if name == "train.py":
                arguments += [*SMALL, f"--config.data.data_dir={tmp_path / 'data'}"]
            if name == "infer.py" and "--prompt" not in " ".join(arguments):
                arguments += ["--repeats=2"]
            done = call(name, *arguments)
            assert done.returncode == 0, f"{name} {arguments}: {done.stderr}"
            printed.append(done.stdout)
        return printed

    return run


@pytest.mark.thorough
def test_training_on_ones_own_text_is_as_in_the_readme(readme, corpus):
    trained, compared, continued = readme(OWN_TEXT, {"PATH": str(corpus)})
    assert "update 2: held-out loss" in trained
    assert re.search(r"12 .*1\.00x", compared) and "written to runs/mine/infer" in compared
    assert continued.startswith("Once")


@pytest.mark.thorough
def test_starting_from_a_model_is_as_in_the_readme(readme, call, small, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plain = [
        "--config.model.sentence_order=false",
        "--config.model.time_modulation=false",
        "--config.model.token_types=2",
    ]
    trained(tmp_path / "run", "tiny_encoder", *small, *plain)
    assert call("interop", "export", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'albert'}").returncode == 0
    names = {"FOLDER": "albert", "FILE": str(next(corpus.iterdir())), "PATH": str(corpus), "NEW_FOLDER": "written"}
    before, adapted, after, exported = readme(OWN_MODEL, names)
    assert "losses on" in before and "held-out loss before" in adapted and "before" in after
    assert exported.startswith("wrote written") and (tmp_path / "written" / "model.safetensors").is_file()
