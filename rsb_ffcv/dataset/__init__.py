"""Offline work: reading raw images from their sources, writing them to `.beton` files, and commands
on such files."""

import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rsb_ffcv import InputError, beton, counted, duration
from rsb_ffcv.atomic import hidden
from rsb_ffcv.dataset.append import concat
from rsb_ffcv.dataset.assemble import merge, shard, subset
from rsb_ffcv.dataset.division import divided
from rsb_ffcv.dataset.inspect import export, info, verify
from rsb_ffcv.dataset.picture import BadPicture, Encoding, Stored, conversion
from rsb_ffcv.dataset.sources import Place, Source
from rsb_ffcv.dataset.workers import ordered
from rsb_ffcv.dataset.writer import OnError, evenly, part_path, write_beton

__all__ = [
    "Encoding",
    "Place",
    "concat",
    "estimate_splits",
    "export",
    "info",
    "merge",
    "shard",
    "subset",
    "verify",
    "write_splits",
]
SAMPLED = 100  # number of pictures that an estimate encodes
SHOWN_CLASSES = 30  # number of classes whose counts are printed
# For messages, what was done with a number of pictures; see beton.About.counts
HOW = {
    "kept": "JPEGs copied unchanged",
    "encoded": "encoded",
    "raw": "stored raw",
    "left out": "left out",
}


@conversion()
def write_splits(
    place: Place,
    write_path: str,
    *,
    split: str = "",
    val_share: float = 0,
    subset: int = -1,
    num_workers: int = 1,
    chunk_size: int = 100,
    encoding: Encoding = Encoding(),
    skip: bool = False,
    max_skipped: float = 0.01,
    report: str = "",
) -> None:
    """Writes one split, or train and val. Prints the estimated size and time before, and the
    content of the files after.

    All sources are opened, and the estimate is compared with the free space, before the first file
    is started. Raises InputError if `split` is unknown, or a source or a file cannot be used.

    place: the dataset
    write_path: the file if `split` is given, otherwise a folder for train.beton and val.beton. With
        `split`, an existing folder or a path that ends in "/" is also a folder
    split: "train", "val", or empty for both
    val_share: share of each class that goes to val, of a dataset that has no val split; above 0 and
        below 1. 0: the dataset has both splits. See division.divided
    subset: number of images to use, from the start of each split; -1: all
    num_workers: threads
    chunk_size: maximum number of encoded images that wait to be written
    encoding: how images are stored
    skip: leave out pictures that cannot be used, instead of raising
    max_skipped: largest share of pictures that may be left out, 0 .. 1
    report: CSV file that lists them. Default: <file>.skipped.csv. With two splits: <name>.train.csv
        and <name>.val.csv
    """
    target = Path(write_path)
    try:
        # Not target.is_dir(): from Python 3.14 on it also returns False if the system rejects the
        # name
        mode = os.stat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:
        raise InputError(
            f"`write_path`={target}: cannot be used ({error.strerror}); choose another"
        ) from error
    if not split and (target.suffix in (".beton", ".ffcv", ".dat") or stat.S_ISREG(mode)):
        raise InputError(
            f"`write_path`={target}: is one file for two splits; give a folder"
            + ("" if val_share else ", or `split`")
        )
    one_file = bool(split) and not (stat.S_ISDIR(mode) or write_path.endswith("/"))
    if report:
        hidden(Path(report), "part")  # raises now if it names no file
    sources = _sources(place, split, val_share=val_share, subset=subset, num_workers=num_workers)
    targets = {name: target if one_file else target / f"{name}.beton" for name in sources}
    needed = sum(
        _estimate(
            targets[name], source, encoding=encoding, num_workers=num_workers, chunk_size=chunk_size
        )
        for name, source in sources.items()
        if not targets[name].exists()
    )
    try:
        folder = target.parent if one_file else target
        folder.mkdir(parents=True, exist_ok=True)
        begun = [part for path in targets.values() if (part := part_path(path)).exists()]
        free = shutil.disk_usage(folder).free + sum(part.stat().st_size for part in begun)
    except OSError as error:
        raise InputError(
            f"`write_path`={target}: cannot be created ({error.strerror}); choose another"
        ) from error
    if needed > free:
        raise InputError(
            f"`write_path`={target}: about {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} "
            f"GB are free; free space, choose another, or lower `max_resolution` or `jpeg_quality`"
        )
    checksums = []
    for name, source in sources.items():
        began = time.monotonic()
        path = targets[name]
        named = Path(report) if report else path.with_name(f"{path.name}.skipped.csv")
        if report and len(sources) > 1:
            named = named.with_name(f"{named.stem}.{name}{named.suffix}")
        on_error = OnError(skip, max_skipped, named)
        written = write_beton(
            path,
            source,
            store=storing(source, encoding),
            settings=settings_of(encoding) | ({"val_share": val_share} if val_share else {}),
            num_workers=num_workers,
            chunk_size=chunk_size,
            on_error=on_error,
            described={"dataset": place.dataset, "split": name},
        )
        assert written.about is not None  # this program wrote it
        if not report and not written.about.counts["left out"]:
            named.unlink(missing_ok=True)  # of an earlier call
        _summary(written, source, time.monotonic() - began, report=on_error.report)
        assert written.extras is not None  # as `about`
        checksums.append(written.extras["checksum"])
    if len(checksums) == 2 and (shared := int(np.isin(checksums[1], checksums[0]).sum())):
        print(
            f"images of val that are byte-identical to an image of train: {shared} of "
            f"{len(checksums[1])}",
            flush=True,
        )


@conversion()
def estimate_splits(
    place: Place,
    split: str,
    *,
    val_share: float,
    subset: int,
    num_workers: int,
    chunk_size: int,
    encoding: Encoding,
) -> None:
    """Prints the size and time that write_splits would need.

    place: the dataset
    split: "train", "val", or empty for both
    val_share: as in write_splits
    subset: number of images to use, from the start of each split; -1: all
    num_workers: threads
    chunk_size: maximum number of encoded images that wait
    encoding: how images are stored

    Raises InputError if a source cannot be used.
    """
    sources = _sources(place, split, val_share=val_share, subset=subset, num_workers=num_workers)
    for name, source in sources.items():
        _estimate(name, source, encoding=encoding, num_workers=num_workers, chunk_size=chunk_size)


def _sources(
    place: Place, split: str, *, val_share: float, subset: int, num_workers: int
) -> dict[str, Source]:
    if subset == 0:
        raise InputError("`subset`=0: no image would be written; give -1 for all")
    if not 0 <= val_share < 1:
        raise InputError(
            f"`val_share`={val_share}: must be above 0 and below 1, or 0 if there is a val split"
        )
    if val_share and split:
        raise InputError(
            f"`split`={split}: cannot be given with `val_share`={val_share}, which writes train "
            f"and val; leave out one of them"
        )
    # The commands on finished files need no reader
    from rsb_ffcv.dataset.readers import open_sources, open_undivided

    if val_share:
        sources = divided(open_undivided(place), val_share, num_workers)
    else:
        sources = open_sources(place, [split] if split else ["train", "val"])
    return {
        name: source.first(subset) if subset > 0 else source for name, source in sources.items()
    }


def storing(source: Source, encoding: Encoding) -> Callable[[int], Stored]:
    """The function that gives write_beton the stored form of each picture of a source."""
    return lambda index: encoding.store(index, source.picture(index), source.place(index))


def settings_of(encoding: Encoding) -> dict:
    """The settings that the bytes of a stored image depend on. They are kept in the file."""
    # None: left out. max_pixels only decides which pictures are rejected
    names = {"mode": "write_mode", "max_pixels": None}
    return {
        names.get(name, name): value
        for name, value in asdict(encoding).items()
        if names.get(name, name)
    } | {"subsampling": "4:2:0", "filter": "bicubic, antialiased"}


def _estimate(
    title: str | Path, source: Source, *, encoding: Encoding, num_workers: int, chunk_size: int
) -> float:
    """Estimates the bytes of a file from pictures spread evenly over the source. Prints them and
    the time."""
    store, began = storing(source, encoding), time.monotonic()

    def size(index: int) -> int | None:
        try:
            return store(index).data.nbytes
        except BadPicture:  # reported when the picture is written
            return None

    chosen = evenly(len(source), SAMPLED).tolist()
    sizes = [
        got
        for got in ordered(size, chosen, threads=num_workers, ahead=chunk_size, name=source.place)
        if got is not None
    ]
    seconds = (time.monotonic() - began) / len(chosen) * len(source)
    each = float(np.mean(sizes)) if sizes else 0.0
    names = sum(map(len, source.names)) + 64 * len(source)
    needed = each * len(source) * (1 + each / 2 / beton.PAGE_BYTES) + names + beton.PAGE_BYTES
    unit, name = (1e9, "GB") if needed >= 1e9 else (1e6, "MB")
    print(
        f"{title}: about {needed / unit:.3g} {name} and {duration(seconds)} with "
        f"{counted(num_workers, 'worker')}, estimated from {len(chosen)} of "
        f"{counted(len(source), 'image')}",
        flush=True,
    )
    return needed


def _summary(written: beton.Beton, source: Source, seconds: float, *, report: Path) -> None:
    """Prints the content of a file, and the images per class compared with the source."""
    assert written.about is not None and written.extras is not None  # this program wrote it
    counts = written.about.counts
    found = np.bincount(written.labels, minlength=len(source.classes))
    total = np.bincount(source.labels, minlength=len(source.classes))
    if total.sum() - found.sum() != counts["left out"] or (found > total).any():
        raise AssertionError(
            f"{written.path}: {found.sum()} of {total.sum()} images, {counts['left out']} left out"
        )
    print(
        f"{written.path}: {counted(len(written), 'image')}, "
        f"{counted(len(source.classes), 'class', 'classes')}, "
        f"{written.num_bytes / 1e6:.1f} MB, in {duration(seconds)} "
        f"({', '.join(f'{count} {HOW[how]}' for how, count in counts.items() if count)})"
    )
    shown = [
        f"{name} {count}" + (f" of {expected}" if count < expected else "")
        for name, count, expected in zip(source.classes, found.tolist(), total.tolist())
        if len(found) <= SHOWN_CLASSES or count < expected
    ]
    if len(found) > SHOWN_CLASSES:
        shown = [f"{found.min()} to {found.max()}", *shown[:SHOWN_CLASSES]]
    print("images per class: " + ", ".join(shown))
    order = np.argsort(written.extras["checksum"], kind="stable")
    firsts = np.flatnonzero(
        np.diff(written.extras["checksum"][order], prepend=~written.extras["checksum"][order[:1]])
    )
    if len(firsts) < len(order):
        lowest, highest = (
            kind.reduceat(written.labels[order], firsts) for kind in (np.minimum, np.maximum)
        )
        print(
            f"byte-identical copies of other images: {len(order) - len(firsts)}; distinct images "
            f"in two or more classes: {int((lowest < highest).sum())}"
        )
    if counts["left out"]:
        print(f"{counted(counts['left out'], 'picture')} left out; see {report}")
    print(end="", flush=True)
