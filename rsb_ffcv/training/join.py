"""How the processes of a job meet, and what they agree on through the job's store.

torch's store is a table at one address: torchrun's, or one of process 0. The processes find each
other there, before they can use collectives, and agree there on who reports an error, when
collectives fail.
"""

import hashlib
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import Empty, Queue
from threading import Thread
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from rsb_ffcv import InputError, first_line
from rsb_ffcv.training import launch, network
from rsb_ffcv.training.lease import LOST

STORE_SECONDS = 5.0  # seconds without a response after which the store is considered lost
BEAT_SECONDS = 0.5  # time between two heartbeats
# Time for the remaining processes to report to each other: their collectives fail at nearly the
# same time.
REPORT_SECONDS = 2.0
HELD_SECONDS = 10.0  # processes of one machine may differ as much in the time that they start
RENDEZVOUS_SECONDS = 600  # time limit for all processes to connect
STORE_CONNECT_SECONDS = 60  # time limit for a connection to torchrun's store
Result = TypeVar("Result")


class _Joined(NamedTuple):
    """The job that this process has joined. Processes can still communicate through its store when
    collectives fail, or when the process group could not be created."""

    store: dist.Store
    rank: int
    world_size: int


_joined: list[_Joined] = []
_held: dict[str, socket.socket] = {}  # see _is_first_here


def join(
    rank: int,
    world_size: int,
    *,
    backend: str,
    timeout_s: float,
    collective_s: float,
    place: Result,
) -> list[Result]:
    """Connects this process to the others and creates the process group. Returns the `place` of
    each process.

    timeout_s: dist.timeout_s, see answer_seconds.
    collective_s: timeout of collectives after that.

    Raises InputError if that fails, or not all have met after RENDEZVOUS_SECONDS. Ends this process
    with status LOST if process 0 is lost, or, when all have met, another one.
    """
    fresh = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if fresh:  # else torchrun listens at the address
        launch.check_address(rank)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    seconds = answer_seconds(timeout_s)

    def open_store() -> dist.Store:
        # torch's rendezvous would wait for all processes, and does not say which are missing.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=fresh and rank == 0,
            timeout=timedelta(seconds=STORE_CONNECT_SECONDS),
            wait_for_workers=False,
        )
        store.set_timeout(timedelta(seconds=RENDEZVOUS_SECONDS))
        return store

    def clone(store: dist.Store) -> dist.Store:
        # torch's stub lacks it
        return within(seconds, store.clone)  # type: ignore[attr-defined]

    try:
        if fresh and rank:
            _await_first_process(address)
        # torchrun listens before it starts its processes
        store = within(seconds if fresh else STORE_CONNECT_SECONDS + STORE_SECONDS, open_store)
        if fresh:
            # Until all have met, an error is reported through this store.
            _joined.append(_Joined(clone(store), rank, world_size))
        store, hosts = _private_store(
            store, rank, world_size, fresh=fresh, address=address, timeout_s=timeout_s
        )
        # A second connection: a collective that waits blocks the first one.
        _joined[:] = [_Joined(clone(store), rank, world_size)]
    except (RuntimeError, OSError) as error:  # from the store
        if _joined:  # it has been lost, with process 0
            hosts = [os.environ["MASTER_ADDR"]] * world_size
            _end_job([0], hosts, timeout_s, is_reporter=reports_without_store(rank))
        raise InputError(
            f"process {rank} of {world_size} cannot connect to the others at {address} "
            f"({first_line(error)}); "
            + (
                "give an address and a free port that all of them can reach"
                if fresh
                else "torchrun listens there; if that machine was lost, start torchrun with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all machines"
            )
        ) from error

    until = time.monotonic() + seconds + REPORT_SECONDS

    def connect() -> list[Any]:
        limit = timedelta(seconds=0.9 * seconds)  # so that its own error is the one reported
        network.choose(store, rank, world_size, nccl="nccl" in backend, within=limit)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=limit
        )
        places: list[Any] = [None] * world_size
        dist.all_gather_object(places, place)
        return places

    try:
        places = within(seconds, connect)
    except (RuntimeError, OSError) as error:
        _end_unconnected(error, until, hosts, timeout_s=timeout_s)
    _set_pg_timeout(timedelta(seconds=collective_s))
    return places


def answer_seconds(timeout_s: float) -> float:
    """The time limit of a collective, with which the processes end within `timeout_s` after another
    one has become silent: at most one heartbeat before the collective, and the report after it,
    are in that time. With a timeout below 5 s, they end up to 2.75 s after this limit."""
    return max(timeout_s - BEAT_SECONDS - REPORT_SECONDS - 0.25, 0.45 * timeout_s)


def agree_on_lost(error: str, until: float) -> tuple[list[int], dict[int, str], bool]:
    """Returns the lost processes, the error of each other process, and whether this process reports
    them. Call this after a collective has failed.

    Every process adds its `error` to a list in the store. The first one that finds those of all
    processes, or has waited until `until` (time.monotonic), decides for all who is lost. The first
    process that is not lost reports. If process 0 is lost, the store may be lost with it: see
    reports_without_store.
    """
    _, rank, size = _joined[0]

    def decided(store: dist.Store) -> str | None:
        """The list when it was decided: rank and error, one process a line."""
        if store.check(["remaining"]):
            return store.get("remaining").decode()
        found = store.get("errors").decode()
        if found.count("\n") < size and time.monotonic() < until:
            return None
        return store.compare_set("remaining", "", found).decode()

    def write(store: dist.Store) -> None:
        store.append("errors", f"{rank} {error}\n")  # type: ignore[attr-defined]  # as for clone

    def wait_for_readers(store: dist.Store, count: int) -> None:
        """Waits on process 0, which may host the store, until the others have read it."""
        store.add("read", 1)
        while rank == 0 and store.add("read", 0) < count:
            time.sleep(0.02)

    try:
        call_store(write, REPORT_SECONDS)
        while (remaining := call_store(decided, REPORT_SECONDS)) is None:
            time.sleep(0.05)
        lines = (line.split(" ", 1) for line in remaining.splitlines())
        errors = {int(other): text for other, text in lines}
        is_reporter = rank == min(errors)
        if rank in errors:  # else it was too late, and nobody waits for it
            with suppress(RuntimeError, TimeoutError):  # a reader is lost now, or process 0
                call_store(lambda store: wait_for_readers(store, len(errors)), REPORT_SECONDS)
    except (RuntimeError, TimeoutError):  # the store is lost, with process 0
        errors = dict.fromkeys(range(1, size), error)
        is_reporter = reports_without_store(rank)
    return [other for other in range(size) if other not in errors], errors, is_reporter


def _end_unconnected(
    error: Exception, until: float, hosts: Sequence[str], *, timeout_s: float
) -> NoReturn:
    """Ends this process with status LOST after the `error` of a connection, if a process has been
    lost. One of the others reports which.

    until: see agree_on_lost; a connection may fail at once, or only after its time limit.
    hosts: the host name of each process.

    Raises InputError, the same on all processes, if none is lost.
    """
    lost, errors, is_reporter = agree_on_lost(first_line(error), until)
    if not lost:
        raise InputError(
            f"the {len(hosts)} processes cannot connect to each other: process 0 ({hosts[0]}) "
            f"reports {errors[0]}; see whether a firewall separates them, and set {network.GLOO} "
            f"to an interface that all machines can reach"
        ) from error
    _end_job(lost, hosts, timeout_s, is_reporter=is_reporter)


def _end_job(
    lost: list[int], hosts: Sequence[str], timeout_s: float, *, is_reporter: bool
) -> NoReturn:
    """Ends this process with status LOST. hosts: the host name of each process."""
    if is_reporter:
        report_lost(
            f"{named(lost, hosts)} did not connect within {timeout_s:g} s (dist.timeout_s): ended, "
            f"stopped, or the machine or its network failed"
        )
    os._exit(LOST)


def named(lost: list[int], hosts: Sequence[str]) -> str:
    """Lost processes as text for a message. hosts: the host name of each process of the job."""
    names = ", ".join(f"{rank} ({hosts[rank]})" for rank in lost)
    return f"process{'es' if len(lost) > 1 else ''} {names} of {len(hosts)}"


def report_lost(text: str) -> None:
    """Prints the line of a process that ends because others are lost."""
    with suppress(OSError):  # of a closed pipe; the status says it as well
        # The leading newline ends the line of a progress bar.
        print(
            f"\nerror: {text}; start the job again, and it resumes from the last checkpoint, if "
            f"there is one",
            file=sys.stderr,
            flush=True,
        )


def _await_first_process(address: str) -> None:
    """Returns when process 0 listens at MASTER_ADDR and MASTER_PORT. torch's store would print a
    stack trace if it does not.

    Raises InputError after RENDEZVOUS_SECONDS, with the same message on all processes of a machine.
    """
    target = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until = time.monotonic() + RENDEZVOUS_SECONDS
    while True:
        try:
            return socket.create_connection(target, STORE_SECONDS).close()
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    f"process 0 does not answer at {address} ({launch.host_name()} waits for it): "
                    f"no connection within {RENDEZVOUS_SECONDS} s ({first_line(error)}); see "
                    f"whether it has started, and the error message of one that ended, and give "
                    f"an address and a free port that all of them can reach"
                ) from error
            time.sleep(0.2)


def _private_store(
    store: dist.Store, rank: int, world_size: int, *, fresh: bool, address: str, timeout_s: float
) -> tuple[dist.Store, list[str]]:
    """Returns `store` with a prefix that only the running processes know, and the host name of each
    process.

    torchrun's store is kept over a restart. Entries of earlier processes would direct the new ones
    to closed ports (pytorch/pytorch#135712).

    Each process writes a unique name. Rank 0 publishes the list of all names repeatedly, until
    every process has found its name in the list.

    fresh: only processes of this start have written to the store.
    address: of the store, for messages.
    timeout_s: dist.timeout_s, see answer_seconds.

    Raises RuntimeError or TimeoutError if the store is lost. Raises InputError, the same on all
    processes that have connected, if that takes more than RENDEZVOUS_SECONDS, or if two of them
    have another WORLD_SIZE or the same RANK. Ends this process with status LOST if one is lost
    after it has connected, and all others have.
    """
    own_name, until = uuid.uuid4().hex, time.monotonic() + RENDEZVOUS_SECONDS
    seconds, listed = answer_seconds(timeout_s), math.inf  # when this process was first listed
    own_entry = f"{own_name} {world_size} {launch.host_name()}"

    def of_all(key: str) -> list[str] | None:
        keys = [f"{key}/{other}" for other in range(world_size)]
        return [store.get(key).decode() for key in keys] if store.check(keys) else None

    def connected() -> dict[int, list[str]]:
        """The name, WORLD_SIZE and machine of each process that has connected."""
        return {
            other: store.get(f"name/{other}").decode().split(" ", 2)
            for other in range(world_size)
            if store.check([f"name/{other}"])
        }

    def failed(name: str) -> str:
        """The key of an error that the process with this name raises."""
        return "failed" if fresh else f"failed/{name}"

    def failure(text: str) -> InputError:
        """The error of this process, which the others raise as well."""
        for key in {failed(name) for name, *_ in connected().values()}:
            store.set(key, text)
        return InputError(text)

    def register() -> None:
        if not fresh:
            store.set(f"name/{rank}", own_entry)
        elif (entry := store.compare_set(f"name/{rank}", "", own_entry).decode()) != own_entry:
            raise failure(
                f"two processes have RANK={rank} (on {entry.split(' ', 2)[2]} and "
                f"{launch.host_name()}); number the {world_size} processes from 0 to "
                f"{world_size - 1}"
            )

    def look() -> tuple[dist.Store, list[str]] | None:
        """The result, if all have met."""
        nonlocal listed
        if store.check([failed(own_name)]):
            raise InputError(store.get(failed(own_name)).decode())
        if fresh and store.check(["errors"]):  # of others, which have waited for this process
            listed = -math.inf
            return None
        if fresh and rank and store.check(["name/0"]):
            _, size, host = store.get("name/0").decode().split(" ", 2)
            if int(size) != world_size:
                raise failure(
                    f"WORLD_SIZE={size} on process 0 ({host}), but {world_size} on process {rank} "
                    f"({launch.host_name()}); start all processes with the same number"
                )
        entries = of_all("name") if rank == 0 else None
        if entries:
            store.set("members", " ".join(entry.split(" ")[0] for entry in entries))
        members = store.get("members").decode() if store.check(["members"]) else ""
        if own_name not in members:
            return None
        listed = min(listed, time.monotonic())
        store.set(f"confirmed/{rank}", members)
        if rank == 0 and of_all("confirmed") == [members] * world_size:
            store.set(f"started/{members}", "")
        if not store.check([f"started/{members}"]):
            return None
        return dist.PrefixStore(members, store), [host for *_, host in connected().values()]

    def absent() -> InputError:
        hosts = {other: host for other, (_, _, host) in connected().items()}
        return failure(
            f"{launch.absent(hosts, world_size)} at {address} after {RENDEZVOUS_SECONDS} s; see "
            f"whether they have started, and the error message of one that ended"
        )

    within(seconds, register)
    while (now := time.monotonic()) < until:
        found = within(seconds, look)
        if found is not None:
            return found
        # In torchrun's store, the others may still be those of an earlier start.
        if fresh and now > listed + seconds:
            hosts = [host for *_, host in within(seconds, connected).values()]
            late = TimeoutError("timed out")
            _end_unconnected(late, now + REPORT_SECONDS, hosts, timeout_s=timeout_s)
        time.sleep(0.02)
    raise within(seconds, absent)


def call_store(function: Callable[[dist.Store], Result], seconds: float) -> Result:
    """Returns `function(store)`, which works even if the job's collectives fail.

    Raises RuntimeError if the store is unreachable, TimeoutError if it does not respond within
    `seconds`: a stopped machine keeps its connections open.
    """
    return within(seconds, lambda: function(_joined[0].store))


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """Returns `function()`, or raises its error. Raises TimeoutError after `seconds`; then the
    function still runs, in a thread that does not prevent the process from ending.

    torch's own timeouts do not hold when the machine of the store is silent.
    """
    results: Queue[tuple[Any, Exception | None]] = Queue()

    def call() -> None:
        try:
            results.put((function(), None))
        except Exception as error:
            results.put((None, error))

    Thread(target=call, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"timed out: no response for {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def is_first_to_report(what: str) -> bool:
    """Returns True on exactly one process, the first that calls this with `what`. Works even if the
    job's collectives fail. See reports_without_store."""
    if not _joined:
        return _is_first_here(what)
    try:
        return call_store(lambda store: store.add(f"reported/{what}", 1), STORE_SECONDS) == 1
    except (RuntimeError, TimeoutError):
        return reports_without_store(_joined[0].rank)


def reports_without_store(rank: int) -> bool:
    """Whether this process reports an error when the store is lost with process 0, which hosts it.
    The others cannot agree on who does: process 1 reports, and the first one of each machine."""
    return rank == 1 or os.environ.get("LOCAL_RANK") == "0"


def _is_first_here(what: str) -> bool:
    """is_first_to_report for the processes of a job on this machine, which have not met the others.
    The first one holds a name until wait_for_others returns, or it ends; the kernel forgets it
    then. Without an address, nothing shows which processes are of one job."""
    size, *place = map(os.environ.get, ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if size in (None, "1") or not all(place):
        return True
    name = hashlib.sha256(f"{os.getuid()} {place} {what}".encode()).hexdigest()
    if name in _held:
        return True
    held = socket.socket(socket.AF_UNIX)
    try:
        held.bind(f"\0rsb_ffcv.{name}")
    except OSError:
        return False
    _held[name] = held
    return True


def wait_for_others(seconds: float = 2.0) -> None:
    """Waits up to `seconds` before a process ends with an error.

    The other processes may be about to raise the same error. They need the store, which rank 0
    hosts, to detect that it has been reported.
    """
    if not _joined:
        if _held:
            time.sleep(HELD_SECONDS)  # others of this machine may be about to report the same
            _held.popitem()[1].close()
        return
    until = time.monotonic() + seconds

    def all_end(store: dist.Store) -> None:
        store.add("ending", 1)
        while store.add("ending", 0) < _joined[0].world_size and time.monotonic() < until:
            time.sleep(0.02)

    with suppress(RuntimeError, TimeoutError):  # the store is lost
        call_store(all_end, seconds + STORE_SECONDS)
