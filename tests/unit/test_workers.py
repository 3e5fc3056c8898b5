"""Results and errors of worker threads come in order, and a thread that hangs is an error."""

import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from rsb_ffcv import InputError
from rsb_ffcv.dataset import workers
from rsb_ffcv.dataset.workers import ordered

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("threads", [1, 4])
def test_results_are_ordered_and_prefetch_is_bounded(threads):
    begun = []

    def slow_at_times(item):
        begun.append(item)
        time.sleep(0.002 * (item % 7 == 0))
        return item * item

    for number, result in enumerate(ordered(slow_at_times, range(200), threads=threads, ahead=10)):
        assert result == number**2 and len(begun) <= number + 11
    assert sorted(begun) == list(range(200))


@pytest.mark.parametrize("error", [ValueError, TimeoutError, SystemExit, KeyboardInterrupt])
def test_error_is_raised_in_order_and_ends_the_threads(error):
    def fails(item):
        if item == 5:
            raise error("at 5")
        return item

    before, seen = set(threading.enumerate()), []
    with pytest.raises(error, match="at 5"):
        for result in ordered(fails, range(100), threads=3):
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4] and set(threading.enumerate()) <= before


def test_result_that_comes_just_after_the_timeout_is_used(monkeypatch):
    class Late(Future):
        def result(self, timeout=None):
            if timeout is None:
                return super().result()
            super().exception()  # waits until it is done
            raise TimeoutError

    monkeypatch.setattr(workers, "Future", Late)
    assert list(ordered(lambda item: item * item, range(5), threads=2)) == [0, 1, 4, 9, 16]


def test_hanging_thread_ends_the_program_with_a_reason():
    """Even if it hangs forever: the program's exit does not wait for it. The other items begin only
    after it hangs, so that it is the one waited for, however slow the machine is."""
    code = f"""
        import sys, threading
        sys.path.insert(0, {str(ROOT)!r})
        from rsb_ffcv import exit_status
        from rsb_ffcv.dataset.workers import ordered
        hanging = threading.Event()
        def hangs(item):
            hanging.set()
            threading.Event().wait()
        def items():
            yield 3
            hanging.wait()
            yield 4
        name = lambda item: f"picture {{item}}"
        results = ordered(hangs, items(), threads=2, name=name, patience=0.5)
        sys.exit(exit_status(lambda: list(results)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "in hangs" in done.stderr  # its stack
    assert done.stderr.splitlines()[-1].startswith("error: picture 3: a worker has hung on it for")


def test_early_exit_cancels_items_that_have_not_begun(monkeypatch):
    """The threads block at their second items until all later items are cancelled."""
    begun, futures, given_up = [], [], threading.Event()

    class Noted(Future):
        def __init__(self):
            super().__init__()
            futures.append(self)

        def cancel(self):
            super().cancel()
            if self is futures[-1]:
                given_up.set()

    def work(item):
        begun.append(item)
        if item and not given_up.wait(60):
            given_up.set()  # the test fails: do not wait again

    monkeypatch.setattr(workers, "Future", Noted)
    results = ordered(work, range(1000), threads=2, ahead=1000)
    next(results)
    results.close()
    assert len(futures) == 1000 and set(begun) <= {0, 1, 2}
    with pytest.raises(InputError):
        for _ in ordered(lambda item: (_ for _ in ()).throw(InputError("x")), [1], threads=1):
            pass


def test_exit_with_a_progress_bar_prints_no_resource_warning():
    """With the start method forkserver, Python 3.14's default."""
    code = f"""
        import multiprocessing, os, sys
        sys.path.insert(0, {str(ROOT)!r})
        multiprocessing.set_start_method("forkserver")
        from tqdm import tqdm
        from rsb_ffcv import exit_status
        exit_status(lambda: [None for _ in tqdm(range(3), desc="bar")] and 0)
        os._exit(0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert (
        done.returncode == 0 and "bar" in done.stderr and "resource_tracker" not in done.stderr
    ), done.stderr
