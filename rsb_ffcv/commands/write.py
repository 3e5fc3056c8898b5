"""The commands of write_ffcv.py."""

import io
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

from rsb_ffcv import exit_status, option_names
from rsb_ffcv.commands import Command, dispatch
from rsb_ffcv.config import write as options
from rsb_ffcv.config.options import read_options

ABOUT = """Writes labelled images to .beton files, and prints, checks and changes such files:
  python write_ffcv.py --cfg.data_dir=/data/imagenet --cfg.write_path=/data/beton
  python write_ffcv.py info --cfg.path=/data/beton/train.beton"""


def _parts(c: options.SourceOptions) -> tuple[Any, Any]:
    """The Place (where the images are) and the Encoding (how they are stored)."""
    from rsb_ffcv import dataset

    place = dataset.Place(
        dataset=c.dataset,
        data_dir=c.data_dir,
        follow_links=c.follow_links,
        class_names=c.class_names,
        callable=c.callable,
        image_column=c.image_column,
        label_column=c.label_column,
    )
    encoding = dataset.Encoding(
        mode=c.write_mode,
        max_resolution=c.max_resolution,
        jpeg_quality=c.jpeg_quality,
        smart_threshold=c.smart_threshold,
        compress_probability=c.compress_probability,
        pass_through=c.pass_through,
        max_pixels=c.max_pixels,
    )
    return place, encoding


def _listed(paths: str) -> list[str]:
    return [path.strip() for path in paths.split(",")]


def _write(c: options.WriteOptions) -> None:
    from rsb_ffcv import dataset

    place, encoding = _parts(c)
    dataset.write_splits(
        place,
        c.write_path,
        split=c.split,
        val_share=c.val_share,
        subset=c.subset,
        num_workers=c.num_workers,
        chunk_size=c.chunk_size,
        encoding=encoding,
        skip=c.on_error == "skip",
        max_skipped=c.max_skipped,
        report=c.report,
    )


def _estimate(c: options.SourceOptions) -> None:
    from rsb_ffcv import dataset

    place, encoding = _parts(c)
    dataset.estimate_splits(
        place,
        c.split,
        val_share=c.val_share,
        subset=c.subset,
        num_workers=c.num_workers,
        chunk_size=c.chunk_size,
        encoding=encoding,
    )


def _info(c: options.InfoOptions) -> None:
    from rsb_ffcv import dataset

    print(dataset.info(c.path))


def _verify(c: options.VerifyOptions) -> int:
    from rsb_ffcv import dataset

    return 0 if dataset.verify(c.path, c.decode, c.num_workers, report=c.report) else 1


def _show(c: options.ShowOptions) -> None:
    from rsb_ffcv.commands.show import show

    show(
        c.path,
        c.write_path,
        samples=c.samples,
        classes=c.classes,
        count=c.count,
        recipe=c.recipe,
        epochs=c.epochs,
    )


def _merge(c: options.MergeOptions) -> None:
    from rsb_ffcv import dataset

    dataset.merge(_listed(c.paths), c.write_path, c.num_workers)


def _subset(c: options.SubsetOptions) -> None:
    from rsb_ffcv import dataset

    dataset.subset(
        c.path,
        c.write_path,
        num_workers=c.num_workers,
        classes=c.classes,
        samples=c.samples,
        per_class=c.per_class,
    )


def _shard(c: options.ShardOptions) -> None:
    from rsb_ffcv import dataset

    dataset.shard(c.path, c.write_path, c.shards, num_workers=c.num_workers)


def _concat(c: options.ConcatOptions) -> None:
    from rsb_ffcv import dataset

    dataset.concat(c.path, _listed(c.paths), c.num_workers)


def _export(c: options.ExportOptions) -> None:
    from rsb_ffcv import dataset

    dataset.export(c.path, c.write_path, c.num_workers)


def _command(text: str, section: type[Any], action: Callable[[Any], int | None]) -> Command:
    """A Command. section: its options, given as --cfg.<name>; action: takes them, returns the exit
    status."""

    def run(arguments: list[str], description: str) -> int | None:
        options = read_options({"cfg": section}, description, arguments)["cfg"]
        names = {item.name: f"cfg.{item.name}" for item in fields(section)}
        with option_names(names | {"mode": "cfg.write_mode"}):
            return action(options)

    return Command(text, {"cfg": section}, run)


COMMANDS = {
    "write": _command("write labelled images to .beton files", options.WriteOptions, _write),
    "estimate": _command(
        "estimate the size and time of write, from a sample of the images",
        options.SourceOptions,
        _estimate,
    ),
    "info": _command(
        "print samples, classes, sizes, modes, settings and bytes of a file",
        options.InfoOptions,
        _info,
    ),
    "verify": _command(
        "check structure, checksums and decoding. Exit status 0: valid, 1: damaged or not a "
        ".beton file, 2: cannot be checked (no such file, wrong option)",
        options.VerifyOptions,
        _verify,
    ),
    "show": _command(
        "draw a contact sheet of images, as stored and as a recipe augments them",
        options.ShowOptions,
        _show,
    ),
    "merge": _command(
        "write all samples of some files to a new one; classes are matched by name. Adds "
        "checksums and entry points to files of stock FFCV",
        options.MergeOptions,
        _merge,
    ),
    "subset": _command(
        "write chosen classes or samples to a new file", options.SubsetOptions, _subset
    ),
    "shard": _command(
        "split a file into several with consecutive samples", options.ShardOptions, _shard
    ),
    "concat": _command(
        "append files to a file in place, without writing its samples again",
        options.ConcatOptions,
        _concat,
    ),
    "export": _command(
        "write a file's images to class folders, byte for byte as they are stored",
        options.ExportOptions,
        _export,
    ),
}


def main() -> int:
    """Runs the command and returns its exit status. Raises InputError for errors that the user can
    correct."""
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid text
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    return dispatch(COMMANDS, "write", ABOUT)


def program() -> int:
    """The console script. Returns the exit status."""
    return exit_status(main)
