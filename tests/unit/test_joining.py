"""Two processes find each other by the environment that a cluster's launcher gives them, here imitated."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "slurm": {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": "{process}",
        "SLURM_LOCALID": "{process}",
    },
    "open mpi 4": {
        "OMPI_MCA_orte_hnp_uri": "28672.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "{process}", "OMPI_COMM_WORLD_LOCAL_RANK": "{process}",
    },
}  # fmt: skip
JOIN = (
    "import jax\n"
    "from odelm.programs.joining import joined\n"
    "with joined(distributed=True, coordinator=None, num_processes=None, process_id=None):\n"
    "    visible = jax.config.values['jax_cuda_visible_devices']\n"
    "    print(jax.process_index(), jax.process_count(), jax.device_count(), visible)\n"
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_are_joined_by_what_their_launcher_says(launcher):
    """Each is one of two, and has the GPU of its number on its host."""
    clusters = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_LOCAL_", "JAX_COORDINATOR_", "XLA_FLAGS")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(clusters)}
    outside |= {"PYTHONPATH": str(ROOT), "JAX_COORDINATOR_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=outside | {name: value.format(process=process) for name, value in LAUNCHERS[launcher].items()},
        )
        for process in (0, 1)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()
    for number, (output, errors) in enumerate(ended):
        assert output.split() == [str(number), "2", "2", str(number)], errors
