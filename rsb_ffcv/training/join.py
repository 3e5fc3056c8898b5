"""How the processes of a job meet, and what they agree on through the job's store.

torch's store is a table at one address: torchrun's, or one of process 0. The processes find each
other there, before they can use collectives, and agree there on who reports an error, when
collectives fail.
"""

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from queue import Empty, Queue
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from rsb_ffcv import InputError, first_line
from rsb_ffcv.training import launch, network

STORE_SECONDS = 5.0  # seconds without a response after which the store is considered lost
HELD_SECONDS = 10.0  # processes of one machine may differ as much in the time that they start
RENDEZVOUS_SECONDS = 600  # time limit for all processes to connect
# Time limit, when all are there, for what precedes the heartbeat
CONNECT_SECONDS = 60
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
    rank: int, world_size: int, *, backend: str, timeout_s: float, place: Result
) -> list[Result]:
    """Connects this process to the others and creates the process group. Returns the `place` of
    each process.

    timeout_s: of collectives; until this function returns, it is CONNECT_SECONDS.

    Raises InputError if that fails, or takes more than RENDEZVOUS_SECONDS.
    """
    fresh = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if fresh:  # else torchrun listens at the address
        launch.check_address(rank)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    within = timedelta(seconds=RENDEZVOUS_SECONDS)
    try:
        if fresh and rank:
            _await_first_process(address)
        # torch's rendezvous would wait for all processes, and does not say which are missing.
        store: dist.Store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=fresh and rank == 0,
            # torchrun listens before it starts its processes
            timeout=within if fresh else timedelta(seconds=CONNECT_SECONDS),
            wait_for_workers=False,
        )
        store.set_timeout(within)
        if fresh:
            # Until all have met, an error is reported through this store.
            _joined.append(_Joined(_clone(store), rank, world_size))
        store = _private_store(store, rank, world_size, fresh=fresh, address=address)
        # A second connection: a collective that waits blocks the first one.
        _joined[:] = [_Joined(_clone(store), rank, world_size)]
        connect = timedelta(seconds=CONNECT_SECONDS)
        network.choose(store, rank, world_size, nccl="nccl" in backend, within=connect)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=connect,
        )
        places: list[Any] = [None] * world_size
        dist.all_gather_object(places, place)
        _set_pg_timeout(timedelta(seconds=timeout_s))
        return places
    except (RuntimeError, OSError) as error:  # from the store, and from gloo
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


def _clone(store: dist.Store) -> dist.Store:
    return store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it


def _private_store(
    store: dist.Store, rank: int, world_size: int, *, fresh: bool, address: str
) -> dist.Store:
    """Returns `store` with a prefix that only the running processes know.

    torchrun's store is kept over a restart. Entries of earlier processes would direct the new ones
    to closed ports (pytorch/pytorch#135712).

    Each process writes a unique name. Rank 0 publishes the list of all names repeatedly, until
    every process has found its name in the list.

    fresh: only processes of this start have written to the store.
    address: of the store, for messages.

    Raises InputError, the same on all processes that have connected, if that takes more than
    RENDEZVOUS_SECONDS, or if two of them have another WORLD_SIZE or the same RANK.
    """
    own_name, until = uuid.uuid4().hex, time.monotonic() + RENDEZVOUS_SECONDS
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

    def failure(text: str) -> InputError:
        """The error of this process, which the others raise as well."""
        for name, *_ in connected().values():
            store.set(f"failed/{name}", text)
        return InputError(text)

    if fresh:
        entry = store.compare_set(f"name/{rank}", "", own_entry).decode()
        if entry != own_entry:
            raise failure(
                f"two processes have RANK={rank} (on {entry.split(' ', 2)[2]} and "
                f"{launch.host_name()}); number the {world_size} processes from 0 to "
                f"{world_size - 1}"
            )
    else:
        store.set(f"name/{rank}", own_entry)
    while time.monotonic() < until:
        if store.check([f"failed/{own_name}"]):
            raise InputError(store.get(f"failed/{own_name}").decode())
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
        if own_name in members:
            store.set(f"confirmed/{rank}", members)
            if rank == 0 and of_all("confirmed") == [members] * world_size:
                store.set(f"started/{members}", "")
            if store.check([f"started/{members}"]):
                return dist.PrefixStore(members, store)
        time.sleep(0.02)
    hosts = {other: host for other, (_, _, host) in connected().items()}
    raise failure(
        f"{launch.absent(hosts, world_size)} at {address} after {RENDEZVOUS_SECONDS} s; see "
        f"whether they have started, and the error message of one that ended"
    )


def call_store(function: Callable[[dist.Store], Result], seconds: float) -> Result:
    """Returns `function(store)`, which works even if the job's collectives fail.

    Raises RuntimeError if the store is unreachable, TimeoutError if it does not respond within
    `seconds`: a stopped machine keeps its connections open.
    """
    results: Queue[tuple[Any, RuntimeError | None]] = Queue()

    def call() -> None:
        try:
            results.put((function(_joined[0].store), None))
        except RuntimeError as error:
            results.put((None, error))

    Thread(target=call, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"the store did not respond within {seconds} s") from None
    if error is not None:
        raise error
    return result


def is_first_to_report(what: str) -> bool:
    """Returns True on exactly one process, the first that calls this with `what`. Works even if the
    job's collectives fail."""
    if not _joined:
        return _is_first_here(what)
    try:
        return call_store(lambda store: store.add(f"reported/{what}", 1), STORE_SECONDS) == 1
    except (RuntimeError, TimeoutError):  # rank 0, which hosts the store, is lost: rank 1 reports
        return _joined[0].rank == 1


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
