"""The arrows between the packages, and what importing odelm must not bring in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import odelm

ROOT = Path(odelm.__file__).parent
GROUND = {"errors", "arguments", "rng", "version", "files", "tokenizer", "config", "ode"}
MODELS = GROUND | {"models"}
DATA = GROUND | {"data"}

# What each part may import of the package, besides itself.
ALLOWED = {
    "errors": set(),
    "version": set(),
    "arguments": {"errors"},
    "lazy": set(),
    "interrupts": set(),
    "processes": {"errors"},
    "rng": {"errors"},
    "files": {"errors"},
    "tokenizer": {"errors", "arguments"},
    "config": {"errors", "version"},
    "ode": {"errors", "arguments"},
    "models": GROUND - {"files", "tokenizer"},
    "data": (GROUND - {"ode"}) | {"interrupts", "lazy"},
    "sharding": MODELS,
    "run_directory": {"errors", "files", "tokenizer", "config"},
    "compiling": set(),
    "manifest": {"files"},
    "retention": {"config"},
    "checkpoint_files": {"config", "errors", "manifest", "retention", "run_directory"},
    "checkpoint": MODELS | {"run_directory", "manifest", "processes", "sharding", "checkpoint_files"},
    "remote": {"config", "errors", "files", "manifest", "checkpoint_files", "run_directory"},
    "interop": MODELS | {"lazy"},
    "int8_storage": set(),
    "shipped": {"errors"},
    "bundle": MODELS | {"int8_storage", "manifest", "profile", "run_directory", "sharding", "version"},
    "profile": {"arguments", "config", "errors", "files", "models", "ode"},
    "pretrained": {"config", "errors", "files", "bundle", "checkpoint", "interop", "profile", "remote", "shipped"},
    "train": MODELS
    | DATA
    | {
        "version",
        "compiling",
        "sharding",
        "run_directory",
        "checkpoint",
        "checkpoint_files",
        "interop",
        "pretrained",
        "shipped",
        "interrupts",
        "processes",
        "remote",
    },
    "infer": MODELS,
    "evals": MODELS | DATA | {"compiling", "run_directory", "pretrained", "profile", "infer"},
}
HEAVY = ("tensorflow_datasets", "orbax", "torch", "transformers", "matplotlib", "grain", "tokenizers", "safetensors")


def imported(source: str) -> set[str]:
    """Returns the parts of odelm that a module's source imports, wherever in it the import stands."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import hides its direction"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "odelm" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("odelm.")}
    return parts


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


# What is run as a program, such as `python -m odelm.interop`, stands above all.
MODULES = sorted(
    p for p in ROOT.rglob("*.py") if part_of(p) not in ("__init__", "programs") and p.name != "__main__.py"
)


def test_imported_finds_every_form():
    source = "import odelm.train.loop\nfrom odelm import ode, rng\ndef f():\n    from odelm.models.lm import create\n"
    assert imported(source) == {"train", "ode", "rng", "models"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    part = part_of(path)
    assert part in ALLOWED, f"odelm/{part} has no place among the layers yet: give it one in this test"
    wrong = imported(path.read_text()) - ALLOWED[part] - {part}
    assert not wrong, f"odelm/{path.relative_to(ROOT)} imports {sorted(wrong)}, against the arrows"


IMPORT = """
import sys, time
start = time.process_time()
import diffrax, flax.nnx, jax, numpy, optax
needed = time.process_time()
from odelm import Config, create, integrate, models, ode
print((time.process_time() - start) / (needed - start), *(name for name in {heavy!r} if name in sys.modules))
"""


def test_importing_the_package_is_light():
    command = [sys.executable, "-c", IMPORT.format(heavy=HEAVY)]
    # The processor's time with what any such library needs, over that of what it needs; noise only adds to it.
    ratio = float("inf")
    for _ in range(3):
        if ratio < 1.25:
            break
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT.parent)
        told, *heavy = result.stdout.split()
        assert not heavy, result.stdout + result.stderr
        ratio = float(told)
    assert ratio < 1.25


def test_a_program_sees_to_its_signals_and_shows_its_help_before_jax_is_imported():
    source = (
        "import sys, odelm.interop, odelm.data, odelm.evals, odelm.programs.launch, odelm.programs.train\n"
        "import odelm.programs.infer, odelm.programs.evals\n"
    )
    show = "print([name for name in ('jax', 'numpy', 'flax') if name in sys.modules])"
    command = [sys.executable, "-c", source + show]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT.parent)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_every_public_name_can_be_imported():
    assert [name for name in odelm.__all__ if not hasattr(odelm, name)] == []
    assert dir(odelm) == sorted(odelm.__all__)
    with pytest.raises(AttributeError, match="module 'odelm' has no attribute 'craete'"):
        _ = odelm.craete
