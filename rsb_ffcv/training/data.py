"""The data of a run: both loaders, and what depends on the content of their files."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch

from rsb_ffcv import InputError
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.loading import EvalLoader, TrainLoader
from rsb_ffcv.training import build, facts
from rsb_ffcv.training.compute import Compute
from rsb_ffcv.training.evaluate import read_label_sets
from rsb_ffcv.training.processes import check_same


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a run.

    train_loader, val_loader: this process's batches.
    num_classes: of the training file.
    label_sets: accepted labels of each evaluation image (see `read_label_sets`), or None.
    recipe: the options and data that define the run, see `facts.recipe`.
    """

    train_loader: TrainLoader
    val_loader: EvalLoader
    num_classes: int
    label_sets: torch.Tensor | None
    recipe: dict

    def preload(self, stop: Callable[[], bool]) -> None:
        """Reads both files into memory. stop: called between reads; if it returns True, the
        rest is not read.
        Raises InputError if they do not fit."""
        for loader in (self.train_loader, self.val_loader):
            try:
                loader.preload(stop)
            except InputError as error:
                raise InputError(f"data.in_memory=1: {error}; use data.in_memory=0") from error


@contextmanager
def open_data(c: TrainConfig, where: Compute) -> Iterator[Data]:
    """Opens the files of the run. On exit, ends the loaders' threads.

    Raises InputError if a file does not fit the recipe or the other file, or if the processes of
    the job do not have the same data, options and versions.
    """
    threads = where.loader_threads(c.data.num_workers)
    with (
        closing(build.train_loader(c, where, threads)) as train_loader,
        closing(build.val_loader(c, where, threads)) as val_loader,
    ):
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
        )
        check_same(
            facts.shared(
                c, where, train_loader=train_loader, val_loader=val_loader, label_sets=label_sets
            )
        )
        yield data
