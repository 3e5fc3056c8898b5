"""The trainer, its checkpoints, evaluation, and the processes that it runs in."""

import os
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType

from rsb_ffcv import InputError, exit_status, option_names
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.training import launch
from rsb_ffcv.training.interrupt import REQUEUE, SIGNALS, Interrupt

# After a process has failed, time for the others to detect it and to end before they are terminated
GRACE_SECONDS = 10.0


def run(config: TrainConfig, interrupt: Interrupt | None = None) -> None:
    """Trains or evaluates according to `config`, in one process or in several.

    Processes that torchrun or srun started are used as they are. With training.distributed=1 and
    without torchrun, this function starts dist.world_size processes.

    interrupt: says when the run is to be saved and ended; None: after a signal.

    Raises SystemExit(75) after SIGTERM or SIGUSR1. The run is saved, and the same command resumes
    it.
    """
    # Set before torch is imported, here or in a child. Without it, torch's store adds C++ stack
    # traces to the one-line message about a lost process.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if config.training.distributed and "RANK" not in os.environ and launch.slurm_tasks() > 1:
        raise InputError(
            f"training.distributed=1: srun has started {launch.slurm_tasks()} processes "
            f"(SLURM_STEP_NUM_TASKS), and each would start {config.dist.world_size} "
            f"(dist.world_size); use training.distributed=0, or one task"
        )
    if config.training.distributed and "WORLD_SIZE" not in os.environ:
        return _spawn(config)
    launch.read_slurm()
    # Before the slow imports, so that a signal during them is noticed.
    interrupt = interrupt or Interrupt(forwarded=launch.has_parent())
    try:
        from rsb_ffcv.training.build import TRAIN_OPTIONS
        from rsb_ffcv.training.compute import within_memory
        from rsb_ffcv.training.join import is_first_to_report, wait_for_others
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
            # If all processes have the same error, one of them reports it.
            is_first = is_first_to_report(str(error))
            wait_for_others()
            if is_first:
                raise
            raise SystemExit(2) from None
    finally:
        interrupt.restore()


def _spawn(config: TrainConfig) -> None:
    """Starts dist.world_size processes on this machine, as ffcv-imagenet does.

    Raises SystemExit, with the status of the job, if one of them fails. It has printed why, or the
    heartbeat of another one has. A message is printed here only if neither was possible.
    """
    try:
        socket.create_server((config.dist.address, config.dist.port)).close()
    except OSError as error:
        raise InputError(
            f"dist.address={config.dist.address}, dist.port={config.dist.port}: cannot be used "
            f"({error.strerror}); give this machine's address (localhost) and a free port"
        ) from error
    children: list[int] = []
    received = forward_signals(children)
    from torch import multiprocessing

    from rsb_ffcv.training.lease import LOST

    processes = multiprocessing.spawn(
        _child, args=(config,), nprocs=config.dist.world_size, join=False
    )
    children += processes.pids()
    if received:  # before there were processes to forward it to
        signal.raise_signal(received[0])
    try:
        while not processes.join(grace_period=GRACE_SECONDS):
            pass
    except multiprocessing.ProcessExitedException as error:
        # A child that a signal killed had not started to train. Nothing is lost: requeue the job.
        if error.exit_code == REQUEUE or any(error.exit_code == -number for number in received):
            raise SystemExit(REQUEUE) from None
        statuses = [process.exitcode for process in processes.processes]
        if error.exit_code < 0 and LOST not in statuses:
            print(
                f"error: process {error.error_index} of {config.dist.world_size} ended "
                f"({error.signal_name}); start the job again, and it resumes from the last "
                f"checkpoint, if there is one",
                file=sys.stderr,
            )
        raise SystemExit(LOST if error.exit_code < 0 else error.exit_code) from None


def forward_signals(children: list[int]) -> list[signal.Signals]:
    """Forwards SIGTERM and SIGUSR1 to the process ids in `children` from this call on.

    `children` may grow later. Returns a list that collects the received signals.
    """
    received: list[signal.Signals] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for child in children:
            with suppress(ProcessLookupError):  # it has ended
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
