"""The trainer, its checkpoints, evaluation, and the processes it runs in."""

import os
import signal
import socket
from contextlib import suppress
from types import FrameType

from rsb_ffcv import InputError, exit_status, option_names
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.training.interrupt import REQUEUE, SIGNALS, Interrupt


def run(config: TrainConfig) -> None:
    """Trains (or evaluates) as `config` says: in this process, in torchrun's, or in processes
    started here.

    Ends with SystemExit(75) where SIGTERM or SIGUSR1 asked for it: the run is saved, and the same
    command continues it.
    """
    # Before torch is imported, here or in a child: where a process is lost one line says so, and
    # torch's store would add C++ stacks
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if config.training.distributed and "WORLD_SIZE" not in os.environ:
        return _spawn(config)
    # Before the imports, and whatever else takes its time
    interrupt = Interrupt(forwarded="WORLD_SIZE" in os.environ)
    try:
        from rsb_ffcv.training.build import TRAIN_OPTIONS
        from rsb_ffcv.training.compute import first_to_say, wait_for_others, within_memory
        from rsb_ffcv.training.trainer import Trainer

        try:
            with (
                option_names(TRAIN_OPTIONS),
                within_memory(
                    f"model.arch={config.model.arch}",
                    "choose a smaller model, or see what else uses the memory",
                ),
                Trainer(config, interrupt) as trainer,
            ):
                trainer.evaluate_only() if config.training.eval_only else trainer.fit()
        except InputError as error:
            said = first_to_say(str(error))  # what is wrong on all processes is told by one
            wait_for_others()
            if said:
                raise
            raise SystemExit(2) from None
    finally:
        interrupt.restore()


def _spawn(config: TrainConfig) -> None:
    """ffcv-imagenet's way to several processes on one machine: dist.world_size of them."""
    try:
        socket.create_server((config.dist.address, config.dist.port)).close()
    except OSError as error:
        raise InputError(
            f"dist.address={config.dist.address}, dist.port={config.dist.port}: cannot be used "
            f"({error.strerror}); give this machine's address (localhost) and a free port"
        ) from error
    children: list[int] = []
    received = hand_on(children)
    from torch import multiprocessing

    processes = multiprocessing.spawn(
        _child, args=(config,), nprocs=config.dist.world_size, join=False
    )
    children += processes.pids()
    if received:  # before there was anybody to hand it to
        signal.raise_signal(received[0])
    try:
        while not processes.join():
            pass
    except multiprocessing.ProcessExitedException as error:
        # A child that a signal ended had not begun: nothing is lost, and the job is to be started
        # again
        if error.exit_code == REQUEUE or any(error.exit_code == -number for number in received):
            raise SystemExit(REQUEUE) from None
        raise InputError(
            f"process {error.error_index} of {config.dist.world_size} ended ({error}); its own "
            f"message is "
            f"above"
        ) from error


def hand_on(children: list[int]) -> list[signal.Signals]:
    """From now on, requests to end go to the processes of `children`, which may grow. Returns the
    list of those received."""
    received: list[signal.Signals] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for child in children:
            with suppress(ProcessLookupError):  # one that has ended
                os.kill(child, number)

    for number in SIGNALS:
        signal.signal(number, forward)
    return received


def _child(rank: int, config: TrainConfig) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(config.dist.world_size),
        LOCAL_WORLD_SIZE=str(config.dist.world_size),
        MASTER_ADDR=config.dist.address,
        MASTER_PORT=str(config.dist.port),
    )
    status = exit_status(run, config)
    if status:
        raise SystemExit(status)
