"""Ctrl-C and SIGTERM: a program ends with one line and status 130 or 143, at any moment of its life.

Python's own way is not enough. Its KeyboardInterrupt ends in a traceback, may be taken for an error of an import, is
lost in a callback, and waits until C++ code, such as a compilation, comes back. So `guarded` raises it to let files and
processes be cleaned up, but not during an import, where compiled code may crash. A thread, which Python wakes for every
signal even while C++ code runs, ends the process if that takes long or if a second signal comes. `StopSignal` postpones
the end until a piece of work is done.

It needs nothing but the standard library, so that it can be in place before anything else is imported.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 3.0
"""Seconds that a program has to clean up its files and processes."""
FAILED = 1
"""The status of a program that cannot continue."""
SHOW_CURSOR = b"\x1b[?25h"
"""A progress bar hides it."""

_put_off = False
"""Whether a StopSignal of this process has caught a signal, so that its work decides when the process ends."""
_interrupted = 0
"""The signal for which a KeyboardInterrupt was raised."""
_forking = threading.local()


class StopSignal:
    """A context in which the first signal sets `requested`, its number, and the second interrupts at once.

    Outside the main thread, where Python handles no signals, it changes nothing.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        global _put_off
        if self.requested:
            _interrupt(number)
        self.requested, _put_off = number, True


def status_of(number: int) -> int:
    """Returns the exit status of a program that a signal has ended, as a shell reports it."""
    return 128 + number


def interrupted() -> bool:
    """Returns whether a signal has begun to end this program: later failures are not to be reported."""
    return _interrupted != 0


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Makes the processes that are started in the block ignore Ctrl-C: their parent ends them."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def guarded(main: Callable[[], int], *, line: str) -> int:
    """Returns the exit status of `main`; a signal ends the process, with `line` on stderr.

    To be called once, from the main thread, as the last thing that a program does: signals that come later end
    the process without a message.
    """
    guard = _Guard(line)
    try:
        status = main()
        sys.stdout.flush()
        guard.end(status)
        return status
    except BaseException as error:
        # A KeyboardInterrupt, or the error that some library turned it into.
        guard.end(None)
        if isinstance(error, BrokenPipeError):
            # The program that reads the output, such as `head`, has closed it.
            os._exit(status_of(signal.SIGPIPE))
        raise


class _Guard:
    """The signal handlers, and the thread that sees a signal while the main thread is busy elsewhere."""

    def __init__(self, line: str):
        self._line, self._leaving, self._ending = line, threading.Lock(), False
        self._told, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_forget)
        for number in SIGNALS:
            signal.signal(number, self._handle)
        self._be_quiet_when_interrupted()
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()

    def end(self, status: int | None) -> None:
        """Ends the process if it was interrupted; with `status` and without another line if the signal was postponed,
        or if the program failed: saves in progress then have nothing more to report."""
        if _interrupted:
            self._leave(_interrupted)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if status is not None and (_put_off or status == FAILED):
            self._exit(status)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if _imports(frame):
            self._leave(number)
        if not _interrupted:
            _interrupt(number)

    def _watch(self) -> None:
        number = self._next_signal()
        if signal.getsignal(number) == self._handle:
            second = self._next_signal(GRACE)
            if second or not _put_off:
                self._leave(second or number)
        self._leave(self._next_signal())

    def _next_signal(self, seconds: float | None = None) -> int:
        """Waits for SIGINT or SIGTERM, and returns which one came; 0 if none came in time."""
        while select.select([self._told], [], [], seconds)[0]:
            number = os.read(self._told, 1)[0]
            if number in SIGNALS:
                return number
        return 0

    def _leave(self, number: int) -> None:
        """Prints that the program was interrupted, and ends it."""
        self._leaving.acquire()
        if sys.stdout.isatty():
            os.write(1, SHOW_CURSOR)
        with contextlib.suppress(OSError):
            os.write(2, f"{self._line}\n".encode())
        self._exit(status_of(number))

    def _exit(self, status: int) -> None:
        """Ends the process without shutting down threads and libraries, which may hang or fail."""
        self._ending = True
        for process in getattr(sys.modules.get("multiprocessing"), "active_children", list)():
            process.kill()
            process.join(1.0)
        # The main thread may hold stdout's lock, and may never release it.
        tidy = threading.Thread(target=_tidy, daemon=True)
        tidy.start()
        tidy.join(1.0)
        os._exit(status)

    def _be_quiet_when_interrupted(self) -> None:
        """Suppresses reports of failures in threads and callbacks once the end has begun."""
        unraisable, in_thread = sys.unraisablehook, threading.excepthook
        sys.unraisablehook = lambda told: None if _interrupted or self._ending else unraisable(told)
        threading.excepthook = lambda told: None if _interrupted or self._ending else in_thread(told)


def _interrupt(number: int) -> None:
    global _interrupted
    _interrupted = number
    raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    """Returns whether something is being imported: compiled modules may crash if an exception comes in between."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _hold() -> None:
    """Blocks signals while a process forks: until the child has other handlers, its signals would reach its parent."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _forget() -> None:
    """Gives a forked child the system's default handling, so that its signals do not reach its parent."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    _let_go()


def _tidy() -> None:
    """Writes what was printed, and removes the semaphores of processes, about which their tracker would complain."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        getattr(sys.modules.get("multiprocessing.util"), "_run_finalizers", lambda priority: None)(0)
