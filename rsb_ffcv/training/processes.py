"""What the processes of a job tell each other besides gradients: when to save, when to stop, that they are alive.

Everything here runs on the CPU (gloo), so that no process waits for its GPU to hear of it.
"""
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

from rsb_ffcv.training.compute import first_to_say

LOST = 3  # another process of the job has ended
BEAT_SECONDS = 0.5


class Votes:
    """Agreement of all processes, once a step: what one of them wants, all do, at the same step.

    The vote of a step is counted during the next, so that nobody waits; with one process, at once. What is granted in a step
    is not asked for again in it: the processes had not yet heard of it when they voted.
    """

    def __init__(self):
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._counting = None

    def cast(self, *wishes: bool) -> tuple[bool, ...]:
        """The wishes of any process, of the step before this one."""
        if self._group is None:
            return wishes
        granted = self.count() or tuple(False for _ in wishes)
        votes = torch.tensor([wish and not had for wish, had in zip(wishes, granted)], dtype=torch.int32)
        self._counting = votes, dist.all_reduce(votes, dist.ReduceOp.MAX, self._group, async_op=True)
        return granted

    def count(self) -> tuple[bool, ...] | None:
        """Waits for the vote in progress; None where there is none."""
        if self._counting is None:
            return None
        votes, work = self._counting
        work.wait()
        self._counting = None
        return tuple(bool(vote) for vote in votes)


class Heartbeat:
    """Ends this process, with one line, soon after another process of the job has died.

    A dead process closes its connections, which the others' beat notices within seconds; a collective of NCCL would
    wait for its timeout.
    """

    def __init__(self):
        self._leaving, self._thread = threading.Event(), None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def _beat(self):
        try:
            while True:
                leaving = torch.tensor(int(self._leaving.is_set()))
                dist.all_reduce(leaving, dist.ReduceOp.MIN, self._group)
                if leaving:
                    return
                self._leaving.wait(BEAT_SECONDS)
        except RuntimeError:  # gloo's word for a connection that is gone
            if self._leaving.is_set():
                return
            if first_to_say("lost"):
                print("error: a process of this job has ended (killed, or with a message of its own above); start the job "
                      "again and it goes on from the last checkpoint", file=sys.stderr, flush=True)
            os._exit(LOST)

    def end(self):
        """Waits until all processes have called this."""
        if self._thread is not None:
            self._leaving.set()
            self._thread.join()

    def verdict(self):
        """After an error in a collective: gives the beat time to find that its cause was another process."""
        if self._thread is not None:
            time.sleep(4 * BEAT_SECONDS)
