"""Writes labelled images into .beton files, and tells what they hold: python write_ffcv.py
--cfg.data_dir=/data/imagenet --cfg.write_path=/data/beton --cfg.max_resolution=500 python
write_ffcv.py info --cfg.path=/data/beton/train.beton"""

import difflib
import io
import sys
from typing import cast

from rsb_ffcv import InputError, exit_status
from rsb_ffcv.config import WRITE_COMMANDS, read_config


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        # names of files may be no text at all
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "write"
    if command not in WRITE_COMMANDS:
        near = difflib.get_close_matches(command, WRITE_COMMANDS, 1, 0.5)
        raise InputError(
            f"{command}: no such command; {f'did you mean {near[0]}?' if near else 'they are'} "
            f"{', '.join(WRITE_COMMANDS)}"
        )
    commands = "\n".join(
        ["commands, as the first word:", *(f"  {kind.__doc__}" for kind in WRITE_COMMANDS.values())]
    )
    c = read_config(WRITE_COMMANDS[command], f"{__doc__}\n\n{commands}", arguments).cfg

    if command == "show":
        from rsb_ffcv.training.show import (
            show,
        )  # torch takes seconds to import: the others do without

        show(c.path, c.write_path, c.samples, c.classes, c.count, c.recipe, c.epochs)
        return 0
    from rsb_ffcv import dataset  # wrong options are told of before

    if command in ("write", "estimate"):
        place = dataset.Place(
            c.dataset,
            c.data_dir,
            c.follow_links,
            c.class_names,
            c.callable,
            c.image_column,
            c.label_column,
        )
        encoding = dataset.Encoding(
            c.write_mode,
            c.max_resolution,
            c.jpeg_quality,
            c.smart_threshold,
            c.compress_probability,
            c.pass_through,
            c.max_pixels,
        )
        if command == "estimate":
            dataset.estimate_splits(place, c.split, c.subset, c.num_workers, c.chunk_size, encoding)
        else:
            dataset.write_splits(
                place,
                c.write_path,
                c.split,
                c.subset,
                c.num_workers,
                c.chunk_size,
                encoding,
                c.on_error == "skip",
                c.max_skipped,
                c.report,
            )
    elif command == "info":
        print(dataset.info(c.path))
    elif command == "verify":
        return 0 if dataset.verify(c.path, c.decode, c.num_workers, c.report) else 1
    elif command == "merge":
        dataset.merge(c.paths.split(","), c.write_path, c.num_workers)
    elif command == "subset":
        dataset.subset(c.path, c.write_path, c.num_workers, c.classes, c.samples, c.per_class)
    elif command == "shard":
        dataset.shard(c.path, c.write_path, c.shards, c.num_workers)
    elif command == "concat":
        dataset.concat(c.path, c.paths.split(","), c.num_workers)
    elif command == "export":
        dataset.export(c.path, c.write_path, c.num_workers)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
