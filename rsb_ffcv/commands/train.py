"""The commands of train_imagenet.py."""

from rsb_ffcv import exit_status
from rsb_ffcv.commands import Command, dispatch
from rsb_ffcv.config.train import SECTIONS, read_config

ABOUT = """Trains an image classifier on .beton files:
  python train_imagenet.py --config-file rsb_configs/a2_300.yaml"""


def _train(arguments: list[str], description: str) -> None:
    config = read_config(description, arguments)
    from rsb_ffcv.training import run

    run(config)


def _plan(arguments: list[str], description: str) -> None:
    unread = {"data.val_dataset", "data.in_memory", "logging.folder"}
    config = read_config(description, arguments, unread=unread)
    from rsb_ffcv.commands.plan import print_plan

    print_plan(config)


COMMANDS = {
    "train": Command("train, or continue, the run of logging.folder", SECTIONS, _train),
    "plan": Command("print what each epoch of a recipe is, without training", SECTIONS, _plan),
}


def main() -> int:
    """Raises InputError for what the user can correct."""
    return dispatch(COMMANDS, "train", ABOUT)


def program() -> int:
    """The console script: the exit status."""
    return exit_status(main)
