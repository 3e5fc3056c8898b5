"""The same work for many items on some threads, its results in order.

Threads, not processes: files are read, and pictures decoded, resized, encoded and checked, without
the interpreter lock. An exception reaches the caller with its item's turn; a thread that comes back
no more ends the work with a line that says where it hangs.
"""

import faulthandler
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from rsb_ffcv import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = 300.0  # seconds without a result, after which a thread counts as stuck


def ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    ahead: int = 100,
    name: Callable[[Item], str] = str,
    patience: float = PATIENCE,
) -> Generator[Result, None, None]:
    """Yields function(item) for each of `items`, in their order, at most `ahead` (two a thread at
    least) of them begun before their turn. Raises what `function` raises, and InputError with
    name(item) where nothing comes for `patience` seconds."""
    tasks: SimpleQueue[tuple[Future[Result], Item] | None] = SimpleQueue()
    pending: deque[tuple[Future[Result], Item]] = deque()

    def work() -> None:
        while (task := tasks.get()) is not None:
            future, item = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(item))
                except BaseException as error:  # handed on: the caller raises it
                    future.set_exception(error)

    # daemons: a thread that hangs in a read must not keep the program from ending
    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    stuck = False
    try:
        items = iter(items)
        while True:
            for item in items:
                pending.append((Future(), item))
                tasks.put(pending[-1])
                if len(pending) >= max(ahead, 2 * threads):
                    break
            if not pending:
                return
            future, item = pending.popleft()
            try:
                result = future.result(patience)
            except TimeoutError as error:
                if future.done():
                    raise  # the work's own
                stuck = True
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                raise InputError(
                    f"{name(item)}: a worker has not come back from it for {patience:.0f} s (where "
                    f"it is stands "
                    f"above); see to the disk or network it is read from, and start again"
                ) from error
            yield result
    finally:
        for future, _ in pending:
            future.cancel()
        for _ in workers:
            tasks.put(None)
        if not stuck:
            for worker in workers:
                worker.join(patience)
