"""How a process joins the others of its job: the same command on each host."""

import contextlib
from collections.abc import Iterator

from odelm.errors import EVERYWHERE, InputError

JOIN_SECONDS = 120
"""How long the processes wait for each other to start."""
HEARTBEAT_SECONDS = 20
"""How long a process may be silent before the others end with an error."""


@contextlib.contextmanager
def joined(
    *, distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Lets this process be one of several while the block runs, if it is `distributed`.

    Where the other three are None `jax.distributed` finds them out from the job's environment. Raises InputError if the
    processes cannot be joined, and for one of the three without `distributed`.
    """
    if not distributed:
        given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
        if extra := [name for name, value in given.items() if value is not None]:
            raise InputError(f"--{extra[0]} was given, which needs --distributed")
        yield
        return
    import jax

    # A signal to one of the processes stops all after the same update (odelm.train.agreement). JAX's own service would
    # take SIGTERM away from us.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes cannot be joined ({str(error).splitlines()[0]}); start the same command for each, with "
            "--coordinator=HOST:PORT --num_processes=N --process_id=0 to N - 1"
        ) from error
    try:
        yield
    except BaseException as error:
        # Not after an error of this process alone: it would wait for the others, which wait until its heartbeat stops.
        if EVERYWHERE in getattr(error, "__notes__", ()):
            with contextlib.suppress(Exception):
                jax.distributed.shutdown()
        raise
    jax.distributed.shutdown()
