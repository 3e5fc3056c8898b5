"""Records a signal that requests the end of the run, until the run reaches a point where it can be
saved.

Does not import torch: the import takes seconds, and a signal during them would be missed.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, resumes the run
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # from spot instances and SLURM (--signal=USR1@60)
# A signal to a process group reaches the children directly, and again when their parent forwards it
ECHO_SECONDS = 2.0


class Interrupt:
    """Records the first SIGTERM or SIGUSR1. A second one ends the process immediately.

    forwarded: this process may receive a signal twice (see launch.has_parent). One within
        ECHO_SECONDS of the first is then ignored as a duplicate.
    """

    def __init__(self, forwarded: bool) -> None:
        self.received: signal.Signals | None = None
        self._echo_until, self._forwarded = 0.0, forwarded
        self._before: dict[signal.Signals, Any] = {}
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._echo_until = time.monotonic() + (ECHO_SECONDS if self._forwarded else 0)
            os.write(
                2,
                f"{self.received.name}: finishing the step and saving; a second signal ends the "
                f"process immediately\n".encode(),
            )
        elif time.monotonic() >= self._echo_until:
            os._exit(128 + number)

    def restore(self) -> None:
        """Reinstalls the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
