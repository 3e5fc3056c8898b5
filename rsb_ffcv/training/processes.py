"""What the processes of a job tell each other besides gradients: whether they agree, when to save,
when to stop, that they live.

Everything here runs on the CPU (gloo and the job's store), so that no process waits for its GPU to
hear of it.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rsb_ffcv import InputError
from rsb_ffcv.training.compute import ask_store, gather, on_first_process

LOST = 3  # another process of the job has ended or is silent
BEAT_SECONDS = 0.5
# in which the processes that are left report to each other: their beats fail at nearly the same
# time
REPORT_SECONDS = 2.0
FOLDER_SECONDS = 5.0  # in which a network file system has to show a new file to the other machines


def check_same(facts: dict[str, str]) -> None:
    """Raises InputError, the same on every process, where a process's facts (name: value) are not
    those of the first."""
    first, *others = gather([facts])
    for rank, theirs in enumerate(others, 1):
        differing = [
            f"{name}: {theirs.get(name)} there, {first.get(name)} on process 0"
            for name in {**first, **theirs}
            if theirs.get(name) != first.get(name)
        ]
        if differing:
            raise InputError(
                f"process {rank} is not like process 0 ({'; '.join(differing)}); start all "
                f"processes with the same recipe, "
                f"files and versions"
            )


def check_shared(folder: Path) -> None:
    """Raises InputError, the same on every process, where one does not see a file that the first
    has just written to `folder`: it could neither resume nor be resumed."""
    path, content = folder / ".shared.part", f"{os.getpid()} {time.time_ns()}"

    def write() -> str:
        try:
            path.write_text(content)
        except OSError as error:
            raise InputError(
                f"logging.folder={folder}: cannot be written ({error.strerror}); choose another"
            ) from error
        return content

    def seen() -> bool:
        try:
            return path.read_text() == content
        except OSError:
            return False

    content, until = on_first_process(write), time.monotonic() + FOLDER_SECONDS
    while not seen() and time.monotonic() < until:
        time.sleep(0.1)
    blind = [str(rank) for rank, sees in enumerate(gather([seen()])) if not sees]

    def judge() -> None:
        path.unlink(missing_ok=True)
        if blind:
            raise InputError(
                f"logging.folder={folder}: process{'es' if blind[1:] else ''} {', '.join(blind)} "
                f"cannot see what process 0 "
                f"writes there; use a folder that all machines of the job share"
            )

    on_first_process(judge)


class Votes:
    """Agreement of all processes, once a step: what one of them wants, all do, at the same step.

    The vote of a step is counted during the next, so that nobody waits; with one process, at once.
    What is granted in a step is not asked for again in it: the processes had not yet heard of it
    when they voted.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._counting: tuple[torch.Tensor, dist.Work] | None = None

    def cast(self, *wishes: bool) -> tuple[bool, ...]:
        """The wishes of any process, of the step before this one."""
        if self._group is None:
            return wishes
        granted = self.count() or tuple(False for _ in wishes)
        votes = torch.tensor(
            [wish and not had for wish, had in zip(wishes, granted)], dtype=torch.int32
        )
        self._counting = (
            votes,
            dist.all_reduce(votes, dist.ReduceOp.MAX, self._group, async_op=True),
        )
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
    """Ends this process, with status LOST, when another process of the job has ended or has been
    silent for `timeout_s` seconds; one of those that are left says which.

    A process that ends closes its connections, which the others' beat notices within a second. One
    that is stopped, or whose machine or link is gone, does not answer. The collectives of training
    would wait for their own timeout, up to half an hour.

    hosts: the name of each process's machine.
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
            self._rank, self._size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
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
        except RuntimeError as error:  # gloo's, of a connection that is gone or of its timeout
            if self._leaving.is_set():
                return
            self._end_job(error)

    def _end_job(self, error: Exception) -> None:
        """Ends this process because of a collective's `error`, which the beat or the run itself has
        met."""
        self._failed.set()
        self._ending.acquire()  # never released: whoever comes second waits here for the end
        self._report("silent" if "timed out" in str(error).lower() else "ended")
        os._exit(LOST)

    def _report(self, what: str) -> None:
        """Says which processes are lost: those that do not report a failed beat to the store as
        well.

        The first process speaks, and where it is lost the first one left. It may have taken the
        store with it: then one process a machine speaks, for they can no longer agree.
        """
        try:
            ask_store(lambda store: store.set(f"beat/{self._rank}", what), REPORT_SECONDS)
            until = time.monotonic() + REPORT_SECONDS
            reports: dict[int, str] = {}
            while len(reports) < self._size and time.monotonic() < until:
                reports = ask_store(self._reports, REPORT_SECONDS)
                if self._rank and 0 in reports:
                    return
                time.sleep(0.02)
        except (RuntimeError, TimeoutError):
            reports = dict.fromkeys(range(1, self._size), what)
            speaks = self._rank == 1 or os.environ.get("LOCAL_RANK") == "0"
        else:
            speaks = self._rank == min(reports)
        if speaks:
            lost = [rank for rank in range(self._size) if rank not in reports]
            print(
                f"\nerror: {self._told(lost, 'silent' in reports.values())}; start the job again "
                f"and it goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )  # a progress bar may stand on the line

    def _reports(self, store: dist.Store) -> dict[int, str]:
        return {
            rank: store.get(f"beat/{rank}").decode()
            for rank in range(self._size)
            if store.check([f"beat/{rank}"])
        }

    def _told(self, lost: list[int], silent: bool) -> str:
        if (
            not lost
        ):  # all are there: a link between two of them failed, or one was silent and woke up
            return (
                f"the processes of this job lost contact for {self._timeout_s:g} s (dist.timeout_s)"
            )
        names = ", ".join(f"{rank} ({self._hosts[rank]})" for rank in lost)
        who = f"process{'es' if len(lost) > 1 else ''} {names} of {self._size}"
        if silent:
            return (
                f"{who} gave no sign of life for {self._timeout_s:g} s (dist.timeout_s): stopped, "
                f"or the machine or its network is "
                f"gone"
            )
        return f"{who} ended (killed, or with a message above)"

    def end(self) -> None:
        """Waits until all processes have called this."""
        if self._thread is not None:
            self._leaving.set()
            self._thread.join()

    def say_no_more(self) -> None:
        """This process ends with a message of its own: that another one ends first is no news."""
        self._leaving.set()

    def verdict(self, error: Exception) -> None:
        """After an `error` of the run: ends this process where it comes from another one that is
        lost. An error that does not say so may still have that cause: the beat gets time to find
        it."""
        if self._thread is None:
            return
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            self._end_job(error)
        if self._failed.wait(4 * BEAT_SECONDS):
            self._thread.join()
