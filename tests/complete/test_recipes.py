"""Recipes trained through the command line, one to its end, and compared at every step count; minutes each."""

import json

import pytest

from tests.cli.conftest import program

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("recipe", "options", "below"), [("tiny", [], 4.1), ("tiny_grouped", ["--config.train.updates=200"], 4.6)]
)
def test_coarse_steps_keep_the_loss(recipe, options, below, tmp_path):
    trained = program("train.py", f"--config=configs/{recipe}.py", *options, f"--workdir={tmp_path}", timeout=1500)
    assert trained.returncode == 0, trained.stderr
    compared = program("infer.py", f"--workdir={tmp_path}", "--batch=8", timeout=600)
    assert compared.returncode == 0, compared.stderr
    rows = {row["steps"]: row for row in json.loads((tmp_path / "infer" / "report.json").read_text())["rows"]}
    assert rows[12]["loss"] < below
    assert rows[3]["loss_increase"] < 0.01
    assert rows[3]["speedup"] > 2.0
