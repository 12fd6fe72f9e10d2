"""An installed package, away from its checkout, does what the checkout can: its programs, and its recipes by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Returns a folder in which the package is installed, without what it depends on, as a user would from a copy."""
    copy, site = tmp_path_factory.mktemp("checkout") / "odelm", tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", f"--target={site}", str(copy)]
    subprocess.run(install, check=True)
    return site


@pytest.mark.slow
def test_the_programs_work_away_from_a_checkout(site, corpus, tmp_path):
    def call(program: str, *arguments: str) -> str:
        command = [str(site / "bin" / program), *arguments]
        where = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)})
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, **where)
        assert done.returncode == 0, done.stderr
        return done.stdout

    data = [f"--config.data.{name}" for name in ("corpus=text", f"source={corpus}", "data_dir=data", "vocab_size=300")]
    size = ["--config.model.width=32", "--config.train.length=16", "--config.train.updates=2"]
    assert "update 2: held-out loss" in call("odelm-train", "--config=tiny_grouped", "--workdir=run", *data, *size)
    assert "written to run/infer" in call("odelm-infer", "--workdir=run", "--repeats=2")
    assert "train batch 0" in call("odelm-data", "show", "--workdir=run")
    (tmp_path / "own.jsonl").write_text('{"text": "one and two"}\n{"text": "two and one"}\n')
    assert "written to run/evals" in call("odelm-evals", "--model=run", "--tasks=own.jsonl", "--repeats=2")
    text = call("odelm-infer", "--model=small-decoder", "--prompt=The", "--new_tokens=2")
    assert text.startswith("The")
    where = subprocess.run([sys.executable, "-c", "import odelm; print(odelm.__file__)"], cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(site), "the package that was installed is the one that ran"
