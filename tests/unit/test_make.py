"""What `make` does to test: pytest is installed first, and what needs a GPU is skipped without one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN_ENVIRONMENT = ("test-newest", "test-newest-with")
"""They install into environments of their own."""
TARGETS = sorted(set(re.findall(r"^(test[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {*OWN_ENVIRONMENT})

if shutil.which("make") is None:
    pytest.skip("make is not installed", allow_module_level=True)


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs make as a user does, where no GPU is visible."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
def test_a_fresh_checkout_installs_pytest_before_it_tests(target, tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    done = make("--dry-run", target, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    before, tests, _ = done.stdout.partition("-m pytest")
    assert tests and re.search(r'pip install .*"\.\[(\w+-)?test\]"', before)


def test_tests_on_a_card_are_skipped_with_a_reason_where_there_is_none():
    done = make("test-gpu", f"BIN={Path(sys.executable).parent}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no GPU that JAX can use" in done.stdout
    assert re.search(r"^\d+ skipped in ", done.stdout, re.MULTILINE), "nothing else than skipped"
    assert "pip install" not in done.stdout, "another Python is left as it is"
