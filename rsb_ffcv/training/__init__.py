"""The trainer, its checkpoints, evaluation, and the processes it runs in."""
import os

from rsb_ffcv import InputError, exit_status
from rsb_ffcv.config import TrainConfig


def run(config: TrainConfig):
    """Trains (or evaluates) as `config` says: in this process, in torchrun's, or in processes started here."""
    from rsb_ffcv.training.trainer import Trainer

    if config.training.distributed and "WORLD_SIZE" not in os.environ:
        return _spawn(config)
    with Trainer(config) as trainer:
        trainer.evaluate_only() if config.training.eval_only else trainer.fit()


def _spawn(config: TrainConfig):
    """ffcv-imagenet's way to several processes on one machine: dist.world_size of them."""
    from torch import multiprocessing

    try:
        multiprocessing.spawn(_child, args=(config,), nprocs=config.dist.world_size)
    except multiprocessing.ProcessExitedException as error:
        raise InputError(f"process {error.error_index} of {config.dist.world_size} ended ({error}); its own message is "
                         f"above") from error


def _child(rank: int, config: TrainConfig):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(config.dist.world_size),
                      LOCAL_WORLD_SIZE=str(config.dist.world_size), MASTER_ADDR=config.dist.address, MASTER_PORT=config.dist.port)
    status = exit_status(run, config)
    if status:
        raise SystemExit(status)
