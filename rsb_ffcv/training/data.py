"""The data of a run: both loaders, and what depends on the content of their files."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import torch

from rsb_ffcv import InputError, first_line, option_names
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.loading import EvalLoader, TrainLoader
from rsb_ffcv.reporting.console import Console
from rsb_ffcv.training import affinity, build, facts
from rsb_ffcv.training.compute import Compute, on_first_process
from rsb_ffcv.training.evaluate import read_label_sets
from rsb_ffcv.training.processes import check_same

MEASURED_BATCHES = 24  # of each way to decode, for data.decode=auto


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a run.

    train_loader, val_loader: this process's batches.
    num_classes: of the training file.
    label_sets: accepted labels of each evaluation image (see `read_label_sets`), or None.
    recipe: the options and data that define the run, see `facts.recipe`.
    decode: what decodes the images, "cpu" or "gpu".
    threads: number of threads of each loader.
    """

    train_loader: TrainLoader
    val_loader: EvalLoader
    num_classes: int
    label_sets: torch.Tensor | None
    recipe: dict
    decode: str
    threads: int

    def preload(self, stop: Callable[[], bool]) -> None:
        """Reads both files into memory. stop: called between reads; if it returns True, the
        rest is not read.
        Raises InputError if they do not fit."""
        for loader in (self.train_loader, self.val_loader):
            try:
                loader.preload(stop)
            except InputError as error:
                raise InputError(f"data.in_memory=1: {error}; use data.in_memory=0") from error


def faster_decode(make: Callable[[str], TrainLoader]) -> tuple[str, str]:
    """Measures both ways to decode. Returns the faster one, "cpu" or "gpu", and the reason.

    make: returns a loader that decodes in the given way. If "gpu" fails, or if its first batch has
        other bytes, the choice is "cpu".
    """

    def measure(decode: str) -> tuple[float, torch.Tensor]:
        """Returns images/s from the first batch on, and the images of the first batch."""
        with closing(make(decode)) as loader, closing(loader.epoch(0)) as batches:
            started, first = perf_counter(), next(batches)
            images = len(first.labels)
            for batch in islice(batches, MEASURED_BATCHES):
                images += len(batch.labels)
            if loader.device.type == "cuda":
                torch.cuda.synchronize(loader.device)
            return images / (perf_counter() - started), first.images.cpu()

    measure("cpu")  # brings the images into the page cache, for both ways
    with_cpu, expected = measure("cpu")
    try:
        with_gpu, made = measure("gpu")
    except (InputError, RuntimeError) as error:  # RuntimeError: of CUDA
        return "cpu", f"gpu cannot be used: {first_line(error)}"
    if not torch.equal(made, expected):
        return "cpu", "the images that the gpu makes are wrong; please report it"
    best = "gpu" if with_gpu > with_cpu else "cpu"
    return best, f"{with_cpu:.0f} images/s with cpu, {with_gpu:.0f} with gpu"


def _chosen_decode(c: TrainConfig, where: Compute, threads: int, *, console: Console) -> str:
    """What data.decode stands for, the same on every process."""
    on_cpu = where.device.type == "cpu"
    if c.data.decode == "gpu" and on_cpu and c.compute.device != "cpu":
        raise InputError(
            "data.decode=gpu: this run has no GPU; use data.decode=cpu or auto, or "
            "compute.device=cpu to emulate one, which is slow"
        )
    if c.data.decode != "auto":
        return c.data.decode
    if on_cpu:
        return "cpu"

    def make(decode: str) -> TrainLoader:
        if decode == "gpu":  # whether the validation fits too
            build.val_loader(c, where, 1, decode=decode).close()
        loader = build.train_loader(c, where, threads, decode=decode)
        loader.check_memory(c.resolution.max_res)
        return loader

    def measure() -> str:
        decode, reason = faster_decode(make)
        console.info(f"data.decode=auto: {decode} ({reason})")
        return decode

    return on_first_process(measure)


@contextmanager
def open_data(c: TrainConfig, where: Compute, console: Console) -> Iterator[Data]:
    """Opens the files of the run. On exit, ends the loaders' threads.

    Raises InputError if a file does not fit the recipe or the other file, or if the processes of
    the job do not have the same data, options and versions.
    """
    threads = where.loader_threads(c.data.num_workers)

    def move() -> None:
        if c.data.affinity and where.device.type == "cuda":
            moved = affinity.move_to_device(affinity.bus_id_of(where.device))
            if moved:
                console.info(moved)

    # After the number of threads is known: each process of the machine gets its share of all cores.
    # A process alone on the machine needs all of them, unless the device decodes.
    alone = where.local_world_size == 1
    if not alone:
        move()
    decode = _chosen_decode(c, where, threads, console=console)
    if alone and decode == "gpu":
        move()
    with (
        closing(build.train_loader(c, where, threads, decode=decode)) as train_loader,
        closing(build.val_loader(c, where, threads, decode=decode)) as val_loader,
    ):
        with option_names(build.TRAIN_OPTIONS):
            train_loader.check_memory(c.resolution.max_res)
        num_classes = build.check_files(c, train_loader.beton, val_loader.beton)
        label_sets = (
            read_label_sets(c.validation.labels, val_loader.beton.names(), num_classes)
            if c.validation.labels
            else None
        )
        data = Data(
            train_loader=train_loader,
            val_loader=val_loader,
            num_classes=num_classes,
            label_sets=label_sets,
            recipe=facts.recipe(c, train_loader, num_classes),
            decode=decode,
            threads=threads,
        )
        check_same(
            facts.shared(
                c, where, train_loader=train_loader, val_loader=val_loader, label_sets=label_sets
            ),
            where.hosts,
        )
        yield data
