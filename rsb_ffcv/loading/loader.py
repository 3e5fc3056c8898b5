"""From a checked `.beton` file to batches of uint8 images and int64 labels.

FFCV's loader decodes in compiled loops that are built anew in each process, hands out views of ring buffers that it
overwrites later, and waits for ever where a worker dies. This one runs the same Operations over a pool of threads
(their kernels release the interpreter lock and are cached on disk), gives each batch memory of its own, and carries
any exception to whoever asked for the batch. What a batch holds depends on (seed, epoch, batch number) alone.
"""
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import psutil
import torch
from ffcv.pipeline.graph import INITIAL_STATE

from rsb_ffcv import InputError
from rsb_ffcv.beton import Beton, read_beton
from rsb_ffcv.loading.order import epoch_order, group_slots
from rsb_ffcv.ops.crop import CenterCrop, RandomResizedCrop
from rsb_ffcv.ops.operation import Address
from rsb_ffcv.ops.rand_augment import RandAugment

BATCHES_AHEAD = 3
ROWS_PER_TASK = 8  # small enough that a slow image does not leave the other threads idle, large enough to amortise


class _Loader:
    """A file, a pool of threads, and a list of Operations: a decoder first, then ops that change the batch in place."""

    def __init__(self, path, batch_size: int, num_workers: int, device):
        if num_workers < 1:
            raise InputError(f"data.num_workers={num_workers}: at least one thread has to load; give 1 or more")
        self.beton: Beton = read_beton(path)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._data = self.beton.map()
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="rsb-loader")

    def close(self):
        """Ends the threads. Iterators that are still open end with an error."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def preload(self):
        """Reads the file once, in order, so that its pages are in memory before the first epoch. Raises InputError
        where it does not fit."""
        available = psutil.virtual_memory().available
        if self.beton.num_bytes > 0.9 * available:
            raise InputError(f"data.in_memory=1: {self.beton.path} has {self.beton.num_bytes / 1e9:.1f} GB and "
                             f"{available / 1e9:.1f} GB of memory are free; use data.in_memory=0")
        for start in range(0, len(self._data), 1 << 24):
            self._data[start:start + (1 << 24):4096].max()  # one byte a page brings the page in

    def _load(self, ops, address: Address, indices: np.ndarray):
        """One batch: (images uint8 (n, H, W, 3), labels int64 (n,)) in memory of its own."""
        heights, widths = self.beton.heights[indices], self.beton.widths[indices]
        drawn = [op.draw(address, heights, widths) for op in ops]
        _, memory = ops[0].declare_state_and_memory(INITIAL_STATE)
        pin = self.device.type == "cuda"
        images = torch.empty((len(indices), *memory.shape), dtype=torch.uint8, pin_memory=pin)
        out = images.numpy()
        codes = [op.generate_code() for op in ops]

        def work(lo):
            hi = min(lo + ROWS_PER_TASK, len(indices))
            failed = codes[0](indices, out, self.beton, self._data, lo, hi, drawn[0])
            if failed >= 0:
                raise InputError(f"{self.beton.path}: sample {indices[failed]} is not a decodable JPEG; "
                                 f"write the file again with write_ffcv.py")
            for code, draw in zip(codes[1:], drawn[1:]):
                code(out, lo, hi, draw)

        for _ in self._pool.map(work, range(0, len(indices), ROWS_PER_TASK)):
            pass
        labels = torch.from_numpy(self.beton.labels[indices])
        return images, labels.pin_memory() if pin else labels

    def _iterate(self, ops, batches):
        """Yields the batches of `batches` (an iterable of (Address, indices)), prepared by a thread of its own."""
        loaded = (self._load(ops, address, indices) for address, indices in batches)
        with closing(_Ahead(loaded, self.device)) as ahead:
            for images, labels in ahead:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class TrainLoader(_Loader):
    """Random-resized crops, flips and RandAugment of a training file, in an order that `seed` and epoch decide.

    batch_size: images a batch. global_batch: slots a step takes over all processes, a multiple of batch_size x
    world_size (default: just that); what does not fill a step is left out of the epoch. resolution: pixels a side,
    may be set between epochs. scale, ratio: of torchvision's RandomResizedCrop. rand_augment: timm's spec, or "".
    interpolation: of RandAugment's geometric ops. num_workers: threads.

    Raises InputError where the file is damaged or holds fewer images than a step takes.
    """

    def __init__(self, path, *, batch_size: int, resolution: int, num_workers: int, seed: int = 0, global_batch: int = 0,
                 scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip_prob: float = 0.5, rand_augment: str = "",
                 interpolation: str = "random", rank: int = 0, world_size: int = 1, device="cpu"):
        super().__init__(path, batch_size, num_workers, device)
        global_batch = global_batch or batch_size * world_size
        if global_batch % (batch_size * world_size):
            raise InputError(f"training.global_batch={global_batch} is not a multiple of training.batch_size="
                             f"{batch_size} x {world_size} processes; change one of them")
        if global_batch > len(self.beton):
            raise InputError(f"a step takes {global_batch} images and {path} holds {len(self.beton)}; lower "
                             f"training.batch_size (or training.global_batch) or write more images")
        self.resolution, self.seed, self.rank, self.world_size = resolution, seed, rank, world_size
        self.global_batch = global_batch
        self.steps_per_epoch = len(self.beton) // global_batch
        self.batches_per_step = global_batch // (batch_size * world_size)
        self._crop = {"scale": scale, "ratio": ratio, "flip_prob": flip_prob}
        self._augment = [RandAugment(rand_augment, interpolation=interpolation)] if rand_augment else []

    def __len__(self):
        """Batches an epoch gives this process."""
        return self.steps_per_epoch * self.batches_per_step

    def slots(self, batch: int) -> np.ndarray:
        """The slots (int64) of this process's batch number `batch`."""
        return group_slots(batch, self.batch_size, self.rank, self.world_size)

    def epoch(self, epoch: int, start_step: int = 0):
        """Yields (images uint8 (batch_size, resolution, resolution, 3), labels int64 (batch_size,)) on `device`, from
        step `start_step` on, without decoding what comes before it. Closing the generator ends its thread."""
        order = epoch_order(self.seed, epoch, len(self.beton))
        batches = ((Address(self.seed, epoch, slots), order[slots]) for slots in
                   map(self.slots, range(start_step * self.batches_per_step, len(self))))
        return self._iterate([RandomResizedCrop(self.resolution, **self._crop), *self._augment], batches)


class EvalLoader(_Loader):
    """Central crops of an evaluation file, each image once over all processes: process r takes every
    world_size-th image from the r-th on, in file order. Batches as TrainLoader's; the last may be smaller.

    crop_ratio: side of the crop over the image's shorter side.
    """

    def __init__(self, path, *, batch_size: int, resolution: int, num_workers: int, crop_ratio: float,
                 rank: int = 0, world_size: int = 1, device="cpu"):
        super().__init__(path, batch_size, num_workers, device)
        self._decoder = CenterCrop(resolution, crop_ratio)
        self._indices = np.arange(rank, len(self.beton), world_size)

    def __len__(self):
        """Batches this process gets."""
        return -(-len(self._indices) // self.batch_size)

    def __iter__(self):
        chunks = (self._indices[start:start + self.batch_size]
                  for start in range(0, len(self._indices), self.batch_size))
        return self._iterate([self._decoder], ((Address(0, 0, chunk), chunk) for chunk in chunks))


class _Ahead:
    """Iterates over `items` in a thread, BATCHES_AHEAD of them in advance. An exception there is raised here."""

    def __init__(self, items, device: torch.device):
        self._items, self._device = items, device
        self._queue, self._stop = queue.Queue(BATCHES_AHEAD), threading.Event()
        self._thread = threading.Thread(target=self._run, name="rsb-loader-ahead")
        self._thread.start()

    def _run(self):
        try:
            if self._device.type == "cuda":  # a new thread's device is 0: pinning there would open a context on GPU 0
                torch.cuda.set_device(self._device)
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # whatever ends this thread has to reach the one that waits for it
            self._put((None, error))

    def _put(self, entry) -> bool:
        # A thread killed inside native code at interpreter exit would abort the process: it ends by itself instead.
        while not self._stop.is_set() and threading.main_thread().is_alive():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self):
        while True:
            try:
                item, error = self._queue.get(timeout=1)
            except queue.Empty:
                if self._thread.is_alive() or not self._queue.empty():
                    continue
                raise RuntimeError("the loader's thread ended before its epoch did") from None
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    def close(self):
        """Ends the thread, after the batch it is working on."""
        self._stop.set()
        self._thread.join()
