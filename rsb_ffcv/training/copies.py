"""The checkpoints of a run in every folder of its job: one that all machines share, or one on each
machine.

At the start the processes find out which of them see the same folder. The lowest rank of those that
do is a writer: it saves the run's checkpoints there. So every machine has what the job needs to go
on without the others. All else (log, figures, report) is written by process 0 only, which makes it
from the log in the checkpoint.

A start takes the newest checkpoint of all writers and makes their folders the same. Each process
then reads it from its own folder. If it is not there, because that folder cannot be written, the
process gets it over the network.
"""

import io
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from rsb_ffcv import InputError, warn
from rsb_ffcv.atomic import remove
from rsb_ffcv.learning.weights import read
from rsb_ffcv.training import checkpoint, compute
from rsb_ffcv.training.checkpoint import BESTS, NAME, Store, records, step_of
from rsb_ffcv.training.compute import Compute
from rsb_ffcv.training.health import decisions

FOLDER_SECONDS = 5.0  # time for a network file system to show a new file to the other machines
CHUNK = 1 << 26  # bytes that are sent at once
TOKEN = ".shared_{}_{}.part"
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A checkpoint that all processes have chosen.

    owner: the process that has read it.
    path: where, on that process.
    best_step: the step of the best checkpoint so far.
    own: its content on `owner`, None on the others.
    """

    owner: int
    path: Path
    best_step: int
    own: dict | None


class Copies:
    """The checkpoints of a run in all folders of its job. Every process of the job calls each
    method, at the same time.

    store: this process's folder.
    where: the processes.

    writers: the ranks that read and write the folders, one for each.
    """

    def __init__(self, store: Store, where: Compute) -> None:
        self.store, self.compute = store, where
        # Without `lock`, nothing is written, and each machine may have another folder.
        self.writers = sorted({where.hosts.index(host) for host in where.hosts})

    @property
    def is_writer(self) -> bool:
        return self.compute.rank in self.writers

    def lock(self) -> str:
        """Finds the writers, each of which locks its folder. Returns a line for the console, empty
        if all processes see one folder.

        Raises InputError, the same on every process, if a folder cannot be used.
        """
        if self.compute.world_size > 1:
            self.writers = sorted(set(self._find_writers()))
        self.store.machine = self.name(self.compute.rank)
        self.on_writers(self.store.lock)
        if self.is_writer:
            for left in self.store.folder.glob(TOKEN.format("*", "*")):  # by a killed process
                with suppress(FileNotFoundError):
                    remove(left)
        others = self.writers[1:]
        if not others:
            return ""
        ranks = ", ".join(map(str, others))
        hosts = ", ".join(self.compute.hosts[rank] for rank in others)
        who, what = (
            (f"processes {ranks} ({hosts})", "keep copies")
            if others[1:]
            else (f"process {ranks} ({hosts})", "keeps a copy")
        )
        return (
            f"logging.folder is not shared: process 0 ({self.compute.hosts[0]}) writes the run, "
            f"and {who} {what} of its checkpoints"
        )

    def _find_writers(self) -> list[int]:
        """For each process, the lowest rank that sees the same folder."""
        start = compute.on_first_process(lambda: uuid.uuid4().hex)
        own = self.store.folder / TOKEN.format(start, self.compute.rank)
        try:
            return self._who_sees(start, own)
        finally:
            with suppress(OSError):  # `lock` removes what is left
                own.unlink()

    def _who_sees(self, start: str, own: Path) -> list[int]:
        """_find_writers, which leaves the file `own`. start: names this start of the job."""
        folder = self.store.folder

        def create() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                own.touch()
            except OSError as error:
                raise InputError(
                    f"logging.folder={folder}: cannot be used ({error.strerror}); choose another"
                ) from error

        compute.on_each(create, self.name)
        seen: set[int] = set()
        until = time.monotonic() + FOLDER_SECONDS
        while True:
            # A listing: a network file system may keep an earlier answer about a single name.
            found = folder.glob(TOKEN.format(start, "*"))
            seen.update(int(path.stem.rpartition("_")[2]) for path in found)
            if len(seen) == self.compute.world_size or time.monotonic() > until:
                break
            time.sleep(0.1)
        writers = list(range(self.compute.world_size))
        for rank, others in enumerate(compute.gather([sorted(seen)])):
            for other in others:
                low, high = sorted((writers[rank], writers[other]))
                if low < high:
                    writers = [low if writer == high else writer for writer in writers]
        return writers

    def on_writers(self, action: Callable[[], Result]) -> list[Result | None]:
        """Runs `action()` on each writer. Returns the results (plain values) of all processes, None
        for those that are no writer. An InputError is raised on every process, and names the
        machine if there are several writers."""
        return compute.on_each(action if self.is_writer else lambda: None, self.name)

    def name(self, rank: int) -> str:
        """Names a process in messages, if there are several writers."""
        several = len(self.writers) > 1
        return f"process {rank} ({self.compute.hosts[rank]})" if several else ""

    # ---------------------------------------------------------------- saving

    def save(self, state: dict, best: bool, best_weights: dict | None = None) -> None:
        """Store.save on each writer."""
        if self.is_writer:
            self.store.save(state, best, best_weights)

    def finish(self) -> bool:
        """Waits for the last save. Returns whether process 0 has saved; a copy that was not written
        is only a warning."""
        written = self.store.finish()
        return compute.on_first_process(lambda: written)

    def finish_or_fail(self, what: str) -> None:
        """Waits for the last save. Raises InputError, the same on every process, if process 0 has
        not saved. what: what is wrong then, and the fix."""
        written = self.store.finish()

        def check() -> None:
            if not written:
                raise InputError(f"{self.store.folder}: {what}")

        compute.on_first_process(check)

    def mark_best(self, path: Path) -> None:
        """Store.mark_best on each writer that has the checkpoint."""

        def mark() -> None:
            if path.exists():
                self.store.mark_best(path)

        self.on_writers(mark)

    # ---------------------------------------------------------------- resuming

    def find(self, recipe: dict | None = None, *, regular: bool = False) -> Choice | None:
        """Chooses the newest intact checkpoint of all writers (see Store.newest); None if there is
        none.

        A machine that was away may have later steps that the run has gone back from since. So the
        number of returns decides before the step.

        recipe: of the run. With several writers, the newest checkpoint of each must have it.
        regular: consider regular checkpoints only.

        Raises InputError, the same on every process.
        """
        own: tuple[Path, dict] | None = None
        damaged: checkpoint.AllDamaged | None = None

        def look() -> tuple[tuple, str, int] | str | None:
            nonlocal own, damaged
            try:
                own = self.store.newest(regular)
            except checkpoint.AllDamaged as error:
                damaged = error
                return str(error)
            if own is None:
                return None
            path, state = own
            if recipe is not None and len(self.writers) > 1:
                checkpoint.check_recipe(state["recipe"], recipe, self.store.folder)
            order = (*decisions(state["health"]), state["step"])
            return order, str(path), state["best"]["step"]

        found = self.on_writers(look)
        intact = {rank: one for rank, one in enumerate(found) if isinstance(one, tuple)}
        if not intact:
            for rank, error in enumerate(found):
                if isinstance(error, str):
                    name = self.name(rank)
                    raise InputError(f"{name}: {error}" if name else error)
            return None
        owner = max(intact, key=lambda rank: (intact[rank][0], -rank))
        if damaged is not None:
            self.store.warn(f"the checkpoint of {self.name(owner)} is used")
            self.store.set_aside(damaged.paths)
        _, path, best_step = intact[owner]
        state = own[1] if own is not None and self.compute.rank == owner else None
        return Choice(owner=owner, path=Path(path), best_step=best_step, own=state)

    def fetch(self, choice: Choice) -> tuple[Path, dict]:
        """The path on this process, and the content of the chosen checkpoint."""
        path = self.store.folder / choice.path.name
        return path, everywhere(choice.owner, choice.path, path, own=choice.own)

    def synchronize(self, choice: Choice) -> None:
        """Makes the folders of all writers the same, before the run goes on from `choice`: none
        keeps a checkpoint that the owner does not have, and each gets those that the run needs: the
        chosen one, the newest regular one and the best.

        Archived checkpoints stay where they are. A file that cannot be written is a warning. Raises
        InputError, the same on every process, if a file cannot be removed.
        """
        if len(self.writers) == 1:
            return
        folder, rank = self.store.folder, self.compute.rank
        own = self.store.contents(choice.best_step) if self.is_writer else {}
        all_own = compute.gather([own])
        wanted = dict(all_own[choice.owner])
        for other in all_own:  # the owner may have failed to write its best one
            wanted |= {name: other[name] for name in other.keys() & BESTS - wanted.keys()}
        newest_regular = max(filter(self.store.regular, _steps(wanted)), default=0)

        def remove_others() -> None:
            paths = [*self.store.paths(), *(folder / name for name in BESTS)]
            self.store.remove(
                path
                for path in paths
                if path.exists()
                and (path.name not in own or own[path.name] != wanted.get(path.name))
                and not any(map(is_old_archive, _steps([path.name])))
            )

        def is_old_archive(step: int) -> bool:
            return self.store.archived(step) and step < newest_regular

        # First: if the job ends in between, no later start resumes from one of them.
        self.on_writers(lambda: None if rank == choice.owner else remove_others())
        needed = BESTS | {choice.path.name, NAME.format(newest_regular)}
        for name in sorted(needed & wanted.keys()):
            has = [others.get(name) == wanted[name] for others in all_own]
            if all(has[writer] for writer in self.writers):
                continue
            source = choice.owner if has[choice.owner] else has.index(True)
            lacks = self.is_writer and not has[rank]
            content = send(folder / name, source, wanted=lacks)
            if lacks:
                try:
                    self.store.put(name, content)
                except InputError as error:
                    self.store.warn(f"{error}; the run continues without this copy")


def _steps(names: Iterable[str]) -> list[int]:
    """The steps of those of the names that are checkpoints'."""
    return [step_of(Path(name)) for name in names if name not in BESTS]


def everywhere(owner: int, path: Path, own_path: Path, *, own: dict | None) -> dict:
    """The content of a checkpoint on every process.

    owner: the process that has read it.
    path: where, on that process.
    own_path: where this process may have the same file, which it then reads.
    own: the content on `owner`, None on the others.
    """
    there = compute.on_process(owner, lambda: records(path))
    state = None
    if records(own_path) == there:
        try:
            state = own or read(own_path, f"process {owner} sends it")
        except InputError as error:
            warn(str(error))
    if any(compute.gather([state is None])):
        content = send(path, owner, wanted=state is None)
        state = state or read(path, "start the job again", content=content)
    assert state is not None
    return state


def send(path: Path, source: int, *, wanted: bool) -> io.BytesIO:
    """Sends the file at `path` on process `source` to the processes that want it. Returns its
    content there, and on the others nothing of use. Every process has to call it.

    Raises InputError, the same on every process, if the file cannot be read.
    """
    content, is_source = io.BytesIO(), dist.get_rank() == source

    def load() -> int:
        try:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, content, CHUNK)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); start the job again"
            ) from error
        return content.tell()

    size = compute.on_process(source, load)
    if not is_source:
        content.write(bytes(min(size, CHUNK)))
        if wanted:
            content.seek(size - 1)
            content.write(b"\0")
    for start in range(0, size, CHUNK):
        count, place = min(CHUNK, size - start), start if is_source or wanted else 0
        part = torch.frombuffer(content.getbuffer(), dtype=torch.uint8, count=count, offset=place)
        dist.broadcast(part, source)
    content.seek(0)
    return content
