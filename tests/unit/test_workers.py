"""Work on threads comes back in order, with its errors, and never hangs without a word."""
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from rsb_ffcv import InputError
from rsb_ffcv.dataset.workers import ordered

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("threads", [1, 4])
def test_results_come_in_order_and_not_far_ahead(threads):
    begun = []

    def slow_at_times(item):
        begun.append(item)
        time.sleep(0.002 * (item % 7 == 0))
        return item * item

    for number, result in enumerate(ordered(slow_at_times, range(200), threads, ahead=10)):
        assert result == number ** 2 and len(begun) <= number + 11
    assert sorted(begun) == list(range(200))


@pytest.mark.parametrize("error", [ValueError, TimeoutError, SystemExit, KeyboardInterrupt])
def test_an_error_comes_in_its_turn_and_ends_the_threads(error):
    def fails(item):
        if item == 5:
            raise error("at 5")
        return item

    before, seen = threading.active_count(), []
    with pytest.raises(error, match="at 5"):
        for result in ordered(fails, range(100), 3):
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4] and threading.active_count() == before


def test_a_thread_that_hangs_ends_the_program_with_its_reason():
    """Also where it hangs for ever: the program's end does not wait for it."""
    code = f"""
        import sys, threading
        sys.path.insert(0, {str(ROOT)!r})
        from rsb_ffcv import exit_status
        from rsb_ffcv.dataset.workers import ordered
        def hangs(item):
            if item == 3:
                threading.Event().wait()
            return item
        sys.exit(exit_status(lambda: list(ordered(hangs, range(9), 2, name=lambda item: f"picture {{item}}", patience=0.5))))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "in hangs" in done.stderr  # its stack
    assert done.stderr.splitlines()[-1].startswith("error: picture 3: a worker has not come back from it for")


def test_leaving_early_gives_up_what_is_not_begun():
    done = []
    results = ordered(lambda item: (time.sleep(0.01), done.append(item)), range(1000), 2, ahead=1000)
    next(results)
    results.close()
    assert len(done) < 100
    with pytest.raises(InputError):
        for _ in ordered(lambda item: (_ for _ in ()).throw(InputError("x")), [1], 1):
            pass
