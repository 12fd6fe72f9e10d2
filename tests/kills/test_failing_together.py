"""What fails in one process of two ends both, each with a line that says why or whom to ask."""

import pytest

from odelm.run_directory import RunDirectory
from tests.kills.test_processes import ended, start

pytestmark = pytest.mark.kills
ASK = "error: process {} failed while getting ready: see what it says\n"


def test_a_text_that_one_process_lacks_ends_both(corpus, tmp_path):
    found = ended(start(tmp_path / "run", corpus, tmp_path, own=("", "--config.data.source=absent")))
    assert [status for status, _ in found] == [1, 2], found
    assert ASK.format(1) in found[0][1]
    assert "error: " in found[1][1] and "absent" in found[1][1] and "Traceback" not in found[1][1]
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_directory_that_another_run_holds_ends_both(corpus, tmp_path):
    short = dict(train__updates=1, train__eval_batches=1)
    ((status, told),) = ended(start(tmp_path / "run", corpus, tmp_path, processes=1, mesh__data=1, **short))
    assert status == 0, told
    with RunDirectory(tmp_path / "run").locked():
        found = ended(start(tmp_path / "run", corpus, tmp_path, **short | dict(train__updates=2)))
    assert [status for status, _ in found] == [2, 1], found
    assert "error: another process trains in" in found[0][1] and ASK.format(0) in found[1][1]
