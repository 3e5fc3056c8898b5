"""Communication between the processes of a job, other than gradients: consistency checks, votes to
save or stop, and the heartbeat.

All of it runs on the CPU (gloo and the job's store), so that no process synchronizes with its GPU
for it.
"""

import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from rsb_ffcv import InputError
from rsb_ffcv.training.compute import gather
from rsb_ffcv.training.join import (
    BEAT_SECONDS,
    REPORT_SECONDS,
    agree_on_lost,
    answer_seconds,
    named,
    report_lost,
    within,
)
from rsb_ffcv.training.lease import LOST, Lease, with_held

RELEASE_SECONDS = 5.0  # time limit for a folder whose file system does not respond


def check_same(facts: dict[str, str], hosts: Sequence[str]) -> None:
    """Raises InputError, the same on every process, if the facts (name: value) of a process differ
    from those of rank 0. hosts: the host name of each process; empty in a run of one process."""
    first, *others = gather([facts])
    differing = [rank for rank, theirs in enumerate(others, 1) if theirs != first]
    if not differing:
        return
    rank = differing[0]
    theirs = others[rank - 1]
    found = [
        f"{name}: {theirs.get(name)}, but {first.get(name)} on process 0"
        for name in {**first, **theirs}
        if theirs.get(name) != first.get(name)
    ]
    machines = sorted({hosts[other] for other in differing})
    more = (
        f"; {len(differing)} processes differ from it, on {', '.join(machines)}"
        if differing[1:]
        else ""
    )
    raise InputError(
        f"process {rank} ({hosts[rank]}) differs from process 0 ({hosts[0]}): {'; '.join(found)}"
        f"{more}; start all processes with the same recipe, files and versions, on GPUs of one kind"
    )


class Votes:
    """A vote of all processes, once per step: if one process requests something, all of them do it,
    at the same step.

    The vote of a step is counted during the next step, so that no process waits for it. With one
    process it is counted immediately. A request that is granted in a step is not cast again in that
    step: the processes voted before they knew the result.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        # the votes, one bit a request; their number; and the all-reduce that counts them
        self._counting: tuple[torch.Tensor, int, dist.Work] | None = None

    def cast(self, *requests: bool) -> tuple[bool, ...]:
        """Casts this step's vote. Returns the result of the previous step's vote: for each request,
        whether any process had it."""
        if self._group is None:
            return requests
        granted = self.count() or tuple(False for _ in requests)
        new = [request and not had for request, had in zip(requests, granted)]
        # One number for all requests: gloo sends each number of a short list in its own messages
        votes = torch.tensor(sum(vote << bit for bit, vote in enumerate(new)), dtype=torch.int32)
        work = dist.all_reduce(votes, dist.ReduceOp.BOR, self._group, async_op=True)
        self._counting = votes, len(requests), work
        return granted

    def count(self) -> tuple[bool, ...] | None:
        """Waits for the vote in progress and returns its result; None if there is none."""
        if self._counting is None:
            return None
        votes, requests, work = self._counting
        work.wait()
        self._counting = None
        return tuple(bool(int(votes) >> bit & 1) for bit in range(requests))


class Heartbeat:
    """Ends this process, with status LOST, if another process of the job has ended or has been
    silent for `timeout_s` seconds. One of the remaining processes reports which one.

    A process that ends closes its connections. The heartbeat of the others detects that within a
    second. A process that is stopped, or whose machine or network is unreachable, does not respond.
    Without the heartbeat, the collectives of training would block until their own timeout, up to
    half an hour.

    hosts: the host name of each process.
    """

    def __init__(self, timeout_s: float, hosts: Sequence[str]) -> None:
        self._timeout_s, self._hosts = timeout_s, hosts
        self._leaving, self._failed, self._ending = (
            threading.Event(),
            threading.Event(),
            threading.Lock(),
        )
        self._thread: threading.Thread | None = None
        if dist.is_initialized():
            seconds = answer_seconds(timeout_s)
            until = time.monotonic() + seconds + REPORT_SECONDS
            try:
                self._group = within(
                    seconds,
                    lambda: dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds)),
                )
            except (RuntimeError, TimeoutError) as error:  # a process was lost while they connected
                self._end_job(error, until)
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        try:
            while True:
                leaving = torch.tensor(int(self._leaving.is_set()))
                dist.all_reduce(leaving, dist.ReduceOp.MIN, self._group)
                if leaving:
                    return
                self._leaving.wait(BEAT_SECONDS)
        except RuntimeError as error:  # from gloo: a closed connection or a timeout
            if self._leaving.is_set():
                return
            failure = error.with_traceback(None)  # whose frames have the group
        # Closes the connections. A process that does not wait for the lost one, but for this one,
        # would otherwise notice only after this one has reported, and be reported as lost.
        dist.destroy_process_group(self._group)
        del self._group
        self._end_job(failure)

    def _end_job(self, error: Exception, until: float | None = None) -> None:
        """Ends this process after the `error` of a collective, in the heartbeat or in the run. One
        of the remaining processes reports which are lost.

        until: see agree_on_lost; None: REPORT_SECONDS from now.
        """
        self._failed.set()
        self._ending.acquire()  # never released: a second thread blocks here until os._exit
        text = str(error).lower()
        lost, errors, is_reporter = agree_on_lost(
            "silent" if "timed out" in text or "timeout" in text else "ended",
            until or time.monotonic() + REPORT_SECONDS,
        )
        # If this process is the one that was silent, its run may have been taken over: then the
        # lease reports that
        with_held(Lease.check, RELEASE_SECONDS)
        if is_reporter:
            report_lost(self._message(lost, "silent" in errors.values()))
        with_held(Lease.release, RELEASE_SECONDS)
        os._exit(LOST)

    def _message(self, lost: list[int], silent: bool) -> str:
        # All of them reported: a connection between two failed, or one was stopped and continued.
        if not lost:
            return (
                f"the processes of this job could not reach each other for {self._timeout_s:g} s "
                f"(dist.timeout_s)"
            )
        who = named(lost, self._hosts)
        if silent:
            return (
                f"{who} did not respond for {self._timeout_s:g} s (dist.timeout_s): stopped, or "
                f"the machine or its network failed"
            )
        return f"{who} ended (killed, or with the message above)"

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Call before this process ends. After a finished run or a signal, waits until all
        processes have called this. After an error that this process reports itself, disables the
        report of lost processes: another process may end first. After any other error, ends this
        process if the cause is a lost process."""
        if kind is None or kind is SystemExit or isinstance(error, InputError):
            self._leaving.set()
        if self._thread is None:
            return
        if kind is None or kind is SystemExit:
            self._thread.join()
        elif isinstance(error, Exception) and not isinstance(error, InputError):
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                self._end_job(error)
            # A lost process may also cause an error that does not mention it. Wait until the
            # heartbeat can detect the loss.
            if self._failed.wait(4 * BEAT_SECONDS):
                self._thread.join()
