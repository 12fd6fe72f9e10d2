"""A run resumes from the checkpoint before one that is damaged, and saves the damaged one again."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odelm import checkpoint_files, manifest, run_directory
from odelm.checkpoint import Checkpoints, Restored
from tests.unit.test_checkpoint import HARMS, OPTIMIZER, remove, save_averaged

pytestmark = pytest.mark.kills

LATER = {"a": jnp.arange(4.0) + 6}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_every_damaged_file_is_passed_over_and_saved_again(tmp_path, harm):
    """Of each file one byte at a drawn place, or all from there on, or the file itself; a third are saved again."""
    rng, files = np.random.default_rng(0), save_averaged(tmp_path)
    steps, aside = tmp_path / run_directory.CHECKPOINTS, tmp_path / run_directory.DAMAGED
    for number, path in enumerate(files):
        whole, told = path.read_bytes(), []
        harm(path, rng)
        checkpoints = Checkpoints(tmp_path, announce=told.append)
        assert values_of(checkpoints.restore_newest(LATER, OPTIMIZER, average=LATER)) == (3, 3.0, 1.5), path
        # A checkpoint without its manifest is one whose save was interrupted, of which nothing is said.
        said = harm is not remove or path.name != manifest.MANIFEST
        assert len(told) == said and all("checkpoint 5" in line and "step 3" in line for line in told), told
        if number % 3 == list(HARMS.values()).index(harm):
            checkpoints.save(5, LATER, OPTIMIZER, average=jax.tree.map(lambda x: x + 1, LATER))
            checkpoints.wait()
            assert checkpoint_files.newest_whole(tmp_path) == 5
            again = checkpoints.restore_newest(LATER, OPTIMIZER, average=LATER)
            assert values_of(again) == (5, 9.0, 10.0)
            shutil.rmtree(steps / "5")
        checkpoints.close()
        assert [step.name for step in steps.iterdir()] == ["3"] and (aside / "5").is_dir()
        (aside / "5").rename(steps / "5")
        path.write_bytes(whole)


def values_of(found: Restored | None) -> tuple[int, float, float]:
    """Returns the step of a checkpoint, and the last of its parameters and of their means."""
    assert found is not None
    return found.step, float(found.params["a"][-1]), float(found.average["a"][-1])
