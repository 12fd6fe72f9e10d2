"""A disk that is really full: one line, the last good checkpoint stays, and the same command resumes later.

The disk is a file system in memory of a few megabytes, in a mount namespace of its own.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills.test_kills import OPTIONS, ROOT

pytestmark = pytest.mark.kills

DRIVER = """
import json, os, subprocess, sys
from pathlib import Path
command, disk, updates = json.loads(sys.argv[1]), Path(sys.argv[2]), (4, 8, 8)
told = []
for number, last in enumerate(updates):
    filler = disk / "filler"
    if number == 1:
        room = os.statvfs(disk)
        # Room for the files of a run, not for a checkpoint.
        filler.write_bytes(bytes(room.f_bavail * room.f_frsize - 60_000))
    if number == 2:
        filler.unlink()
    done = subprocess.run([*command, f"--config.train.updates={last}"], capture_output=True, text=True)
    steps = sorted(path.parent.name for path in disk.glob("run/checkpoints/*/manifest.sha256"))
    told.append({"status": done.returncode, "stderr": done.stderr, "stdout": done.stdout, "steps": steps})
print(json.dumps(told))
"""


def has_mounts(disk: Path) -> bool:
    """Returns whether this user may mount a file system in a namespace of their own."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True)
    return tried.returncode == 0


def test_a_full_disk_costs_no_checkpoint(corpus, tmp_path):
    disk, cache = tmp_path / "disk", tmp_path / "cache"
    disk.mkdir()
    if not has_mounts(disk):
        pytest.skip("no file system can be mounted here")
    options = OPTIONS | {"data.source": corpus, "data.data_dir": cache / "data"}
    options |= {"optimizer.decay": "constant", "optimizer.warmup": 0}
    command = [sys.executable, "train.py", "--config=tiny", f"--workdir={disk / 'run'}",
               f"--compilation_cache={cache / 'xla'}"]  # fmt: skip
    command += [f"--config.{name}={value}" for name, value in options.items()]
    mounted = f'mount -t tmpfs -o size=4m tmpfs {disk} && exec {sys.executable} - "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted, "sh", json.dumps(command), str(disk)],
        input=DRIVER, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, full, after = json.loads(done.stdout)
    assert (before["status"], before["steps"]) == (0, ["4"])
    assert (full["status"], full["steps"]) == (1, ["4"]), full
    (line,) = full["stderr"].splitlines()
    assert re.match(r"error: checkpoint 8 of .* cannot be written \(.*No space left.*: make room", line), line
    assert (after["status"], after["steps"]) == (0, ["4", "8"])
    assert "resumed after update 4" in after["stdout"]
