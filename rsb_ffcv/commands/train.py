"""The commands of train_imagenet.py."""

import argparse

from rsb_ffcv import exit_status
from rsb_ffcv.commands import Command, dispatch
from rsb_ffcv.config.options import config_files
from rsb_ffcv.config.train import (
    ONLY_FOR_RUNS,
    SECTIONS,
    AppOptions,
    EvalOptions,
    ExportOptions,
    PlanOptions,
    PredictOptions,
    read_config,
    read_eval,
    read_plan,
    read_words,
)

ABOUT = """Trains an image classifier on .beton files:
  python train_imagenet.py --config-file rsb_configs/a2_300.yaml"""


def _train(arguments: list[str], description: str) -> None:
    config = read_config(description, arguments)
    from rsb_ffcv.training import run

    run(config)


def _plan(arguments: list[str], description: str) -> None:
    config, options = read_plan(description, arguments)
    from rsb_ffcv.commands.plan import print_plan

    print_plan(config, options, config_files(arguments))


def _eval(arguments: list[str], description: str) -> None:
    config, options = read_eval(description, arguments)
    from rsb_ffcv.commands.evaluate import evaluate_weights

    evaluate_weights(config, options)


def _doctor(arguments: list[str], description: str) -> int:
    config = read_config(description, arguments, unread={*ONLY_FOR_RUNS, "data.train_dataset"})
    from rsb_ffcv.commands.doctor import examine

    return examine(config)


def _smoke(arguments: list[str], description: str) -> int:
    # Files that the recipe names may be missing; those that the command line names may not.
    given = {argument[2:].partition("=")[0] for argument in arguments}
    unread = {*ONLY_FOR_RUNS, "data.train_dataset"} - given
    config = read_config(description, arguments, unread=unread)
    from rsb_ffcv.commands.smoke import smoke

    return smoke(config)


def _export(arguments: list[str], description: str) -> None:
    words = ("run", "folder of a run")
    options, runs = read_words(description, arguments, command="export", words=words)
    from rsb_ffcv.commands.export import export_run

    export_run(runs, options)


def _predict(arguments: list[str], description: str) -> int:
    words = ("pictures", "files, folders or patterns of pictures, and .beton files")
    options, given = read_words(description, arguments, command="predict", words=words)
    from rsb_ffcv.commands.predict import predict

    return predict(given, options)


def _app(arguments: list[str], description: str) -> None:
    words = ("model", "folder that export wrote")
    options, models = read_words(description, arguments, command="app", words=words)
    from rsb_ffcv.commands.app import write_app

    write_app(models, options)


def _folders(command: str, arguments: list[str], description: str) -> list[str]:
    """The arguments of a command that takes folders of runs, and no options."""
    parser = argparse.ArgumentParser(
        prog=f"train_imagenet.py {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run")
    folders: list[str] = parser.parse_args(arguments).runs
    return folders


def _compare(arguments: list[str], description: str) -> None:
    folders = _folders("compare", arguments, description)
    from rsb_ffcv.commands.compare import compare

    compare(folders)


def _report(arguments: list[str], description: str) -> None:
    folders = _folders("report", arguments, description)
    from rsb_ffcv.commands.report import write_report

    write_report(folders)


COMMANDS = {
    "train": Command("start or resume the run in logging.folder", SECTIONS, _train),
    "plan": Command(
        "print the epochs, size and hours of a recipe, without training",
        SECTIONS | {"plan": PlanOptions},
        _plan,
    ),
    "doctor": Command(
        "check versions, device, memory, disk and speed for a recipe, before it runs",
        SECTIONS,
        _doctor,
    ),
    "smoke": Command(
        "run a recipe with all its phases, shortened to minutes, and check its log",
        SECTIONS,
        _smoke,
    ),
    "compare": Command(
        "show how the recipes and the results of runs differ: compare FOLDER FOLDER ...",
        {},
        _compare,
    ),
    "report": Command(
        "write metrics.json and report.html of a run, also of one that has not finished: report "
        "FOLDER",
        {},
        _report,
    ),
    "eval": Command(
        "evaluate a file of weights on data.val_dataset, also class by class",
        SECTIONS | {"eval": EvalOptions},
        _eval,
    ),
    "export": Command(
        "write the weights of a run for use: timm and the Hugging Face Hub, torch.export, ONNX: "
        "export FOLDER",
        {"export": ExportOptions},
        _export,
    ),
    "predict": Command(
        "classify pictures with an exported model: predict PICTURE PICTURE ...",
        {"predict": PredictOptions},
        _predict,
    ),
    "app": Command(
        "write a Gradio app for an exported model: app FOLDER", {"app": AppOptions}, _app
    ),
}


def main() -> int:
    """Runs the command and returns its exit status. Raises InputError for errors
    that the user can correct."""
    return dispatch(COMMANDS, "train", ABOUT)


def program() -> int:
    """The console script. Returns the exit status."""
    return exit_status(main)
