"""Offline: where raw images come from, and how they become a `.beton` file."""
from pathlib import Path

from rsb_ffcv import InputError
from rsb_ffcv.dataset.sources import open_source


def write_splits(dataset: str, data_dir: str, write_path: str, split: str = "", subset: int = -1, num_workers: int = 1,
                 chunk_size: int = 100, **encoding):
    """Writes `split`, or where it is empty train and val, and prints one line for each file.

    write_path: with `split` the file, else a folder for train.beton and val.beton (with `split` too, where it is a folder
    or ends in "/"). subset: first images of each split;
    -1: all. encoding: the fields of writer.Encoding. All sources are opened before the first file is begun.
    """
    from rsb_ffcv.dataset.writer import Encoding, write_beton

    target = Path(write_path)
    if subset == 0:
        raise InputError("cfg.subset=0: no image would be written; use -1 for all")
    if not split and (target.suffix in (".beton", ".ffcv", ".dat") or target.is_file()):
        raise InputError(f"cfg.write_path={target}: names one file for two splits; give a folder, or cfg.split")
    one_file = bool(split) and not (target.is_dir() or write_path.endswith("/"))
    sources = {name: open_source(dataset, data_dir, name) for name in ([split] if split else ["train", "val"])}
    try:
        (target.parent if one_file else target).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cfg.write_path={target}: cannot be made ({error.strerror}); choose another") from error
    for name, source in sources.items():
        path = target if one_file else target / f"{name}.beton"
        written = write_beton(path, source.first(subset) if subset > 0 else source, Encoding(**encoding), num_workers,
                              chunk_size)
        print(f"{written['path']}: {written['samples']} images, {written['classes']} classes, "
              f"{written['bytes'] / 1e6:.1f} MB", flush=True)
