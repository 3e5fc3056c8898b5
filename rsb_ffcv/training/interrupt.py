"""A request to end, noted until the run comes to a place where it can be saved. Without torch,
whose import takes seconds in which a request would go unnoticed."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again and the run goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of spot instances and of SLURM (--signal=USR1@60)
ECHO_SECONDS = 2.0  # a parent that forwards its own signal to a whole group makes two of one


class Interrupt:
    """Notes the first SIGTERM or SIGUSR1. A second one ends the process at once.

    forwarded: this process has a parent (torchrun, training.distributed=1) that hands signals on;
    one that comes within ECHO_SECONDS of the first is then its echo. `restore` puts back what
    handled the signals before.
    """

    def __init__(self, forwarded: bool) -> None:
        self.received: signal.Signals | None = None
        self._echo_until, self._forwarded = 0.0, forwarded
        self._before: dict[signal.Signals, Any] = {}
        if (
            threading.current_thread() is threading.main_thread()
        ):  # elsewhere Python hands signals to nobody
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._echo_until = time.monotonic() + (ECHO_SECONDS if self._forwarded else 0)
            os.write(
                2,
                f"{self.received.name}: finishing the step and saving; a second signal ends at "
                f"once\n".encode(),
            )
        elif time.monotonic() >= self._echo_until:
            os._exit(128 + number)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
