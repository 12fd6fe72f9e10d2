"""Signals ask a piece of work to end, or end the whole program: with one line, whatever it is doing."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from odelm import interrupts
from odelm.interrupts import SIGNALS, StopSignal, deaf_children

LINE = "stopped, as asked\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_requests_an_end(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested == number
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("second", SIGNALS)
def test_second_signal_interrupts_at_once_and_restores_the_handlers(second, monkeypatch):
    monkeypatch.setattr(interrupts, "_interrupted", 0)
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), second)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_outside_the_main_thread_signals_are_left_alone():
    failed = []

    def work() -> None:
        try:
            with StopSignal() as stop:
                assert not stop.requested
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


@pytest.fixture
def heard():
    """Ctrl-C as Python begins with it; a shell's job in the background is deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_children_are_deaf_to_ctrl_c_and_their_parent_is_not(heard):
    with deaf_children():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.send_signal(signal.SIGINT)
    child.communicate(b"\n", timeout=60)
    assert child.returncode == 0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


BEFORE = """
import os, signal, sys, threading, time
from odelm import interrupts
def kill(number=signal.{name}):
    os.kill(os.getpid(), number)
"""
AFTER = f"""
sys.exit(interrupts.guarded(main, line={LINE.strip()!r}))
"""
PROGRAMS = {
    "in Python": """
def main():
    print("before")
    kill()
    time.sleep(60)
""",
    "taken for an error": """
def main():
    try:
        kill()
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError("no such thing")
""",
    "swallowed": """
interrupts.GRACE = 0.2
def main():
    for _ in range(3):
        try:
            kill()
            time.sleep(60)
        except KeyboardInterrupt:
            pass
        time.sleep(60)
""",
    "in a destructor": """
interrupts.GRACE = 0.2
class Loud:
    def __del__(self):
        kill()
        time.sleep(0)
def main():
    Loud()
    time.sleep(60)
""",
    "outside Python": """
import ctypes
interrupts.GRACE = 0.2
def main():
    threading.Timer(0.5, kill).start()
    ctypes.CDLL(None).usleep(60_000_000)
""",
    "twice": """
def main():
    try:
        kill()
        time.sleep(60)
    finally:
        kill()
        time.sleep(60)
""",
    "twice, put off": """
def main():
    with interrupts.StopSignal() as stop:
        kill()
        assert stop.requested
        kill()
        time.sleep(60)
""",
    "while a thread fails": """
def main():
    def work():
        while not interrupts.interrupted():
            time.sleep(0.01)
        raise RuntimeError("the main thread has gone")
    threading.Thread(target=work).start()
    try:
        kill()
        time.sleep(60)
    finally:
        time.sleep(0.3)
""",
    "while a thread reads a queue": """
import contextlib, hashlib, multiprocessing.util, queue
def main():
    told = multiprocessing.Queue()
    multiprocessing.util.Finalize(None, time.sleep, (0.3,), exitpriority=0)
    def read():
        while True:
            with contextlib.suppress(queue.Empty):
                told.get(True, 0.001)
    told.put("something")
    threading.Thread(target=read, daemon=True).start()
    with interrupts.StopSignal():
        kill()
        threading.Timer(0.5, kill).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
""",
    "with children": """
import subprocess
def main():
    import multiprocessing
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    print(child.pid)
    sys.stdout.flush()
    kill()
    time.sleep(60)
""",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_ends_with_one_line_and_its_status(program, number):
    source = BEFORE.format(name=number.name) + program + AFTER
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (128 + number, LINE)
    if "before" in program:
        assert done.stdout == "before\n"
    if "pid" in program:
        with pytest.raises(ProcessLookupError):
            os.kill(int(done.stdout), 0)


def test_a_child_that_is_ended_does_not_end_its_parent():
    source = """
def main():
    child = os.fork()
    if not child:
        time.sleep(60)
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + signal.SIGTERM
"""
    done = subprocess.run([sys.executable, "-c", BEFORE.format(name="SIGINT") + source + AFTER], timeout=50)
    assert done.returncode == 0


def test_work_that_is_put_off_decides_how_the_program_ends():
    source = """
interrupts.GRACE = 0.1
def main():
    with interrupts.StopSignal() as stop:
        kill()
        time.sleep(0.5)
        print("saved")
    time.sleep(0.5)
    return interrupts.status_of(stop.requested)
"""
    command = [sys.executable, "-c", BEFORE.format(name="SIGTERM") + source + AFTER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (143, "saved\n", "")


def test_output_that_nobody_reads_any_more_is_no_error():
    source = BEFORE.format(name="SIGINT") + "def main():\n    while True: print('y' * 1000)" + AFTER
    command = [sys.executable, "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
