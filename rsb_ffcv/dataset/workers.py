"""Maps a function over many items with several threads and yields the results in order.

Threads instead of processes: files are read, and pictures decoded, resized, encoded and checked,
without the interpreter lock. An exception is raised in the caller at its item's position. If a
thread hangs, the stacks of all threads are printed and InputError is raised.
"""

import faulthandler
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from rsb_ffcv import STALL_SECONDS, InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    ahead: int = 100,
    name: Callable[[Item], str] = str,
    patience: float = STALL_SECONDS,
) -> Generator[Result, None, None]:
    """Yields function(item) for each item, in order.

    function: the work; it is called in the threads
    items: its arguments
    threads: number of threads
    ahead: at most this many items are started before their results are taken (but at least two per
        thread)
    name: the name of an item in messages
    patience: seconds to wait for a result

    Raises what `function` raises, and InputError with name(item) if there is no result for
    `patience` seconds.
    """
    tasks: SimpleQueue[tuple[Future[Result], Item] | None] = SimpleQueue()
    pending: deque[tuple[Future[Result], Item]] = deque()

    def work() -> None:
        while (task := tasks.get()) is not None:
            future, item = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(item))
                except BaseException as error:  # raised again in the caller
                    future.set_exception(error)

    # Daemons: a thread that hangs in a read must not prevent the program from exiting
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
                if not future.done():
                    stuck = True
                    faulthandler.dump_traceback(sys.stderr, all_threads=True)
                    raise InputError(
                        f"{name(item)}: a worker has hung on it for {patience:.0f} s (its stack "
                        f"is printed above); check the disk or network that it reads from, and "
                        f"run the same command again"
                    ) from error
                result = future.result()  # it came just after the timeout, or `function` raised it
            yield result
    finally:
        for future, _ in pending:
            future.cancel()
        for _ in workers:
            tasks.put(None)
        if not stuck:
            for worker in workers:
                worker.join(patience)
