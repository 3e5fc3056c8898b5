"""Offline: where raw images come from, and how they become a `.beton` file."""
from pathlib import Path

from rsb_ffcv import InputError
from rsb_ffcv.dataset.sources import open_source


def write_splits(dataset: str, data_dir: str, write_path: str, split: str = "", subset: int = -1, num_workers: int = 1,
                 chunk_size: int = 100, **encoding):
    """Writes `split`, or where it is empty train and val, and prints one line for each file.

    write_path: the file of one split, or a folder for train.beton and val.beton. subset: first images of each split;
    -1: all. encoding: the fields of writer.Encoding. All sources are opened before the first file is begun.
    """
    from rsb_ffcv.dataset.writer import Encoding, write_beton

    target = Path(write_path)
    if subset == 0:
        raise InputError("cfg.subset=0: no image would be written; use -1 for all")
    if target.suffix == ".beton" and not split:
        raise InputError(f"cfg.write_path={target}: names one file for two splits; give a folder, or cfg.split")
    sources = {name: open_source(dataset, data_dir, name) for name in ([split] if split else ["train", "val"])}
    counts = {name: len(source.classes) for name, source in sources.items()}
    if len(set(map(tuple, (source.classes for source in sources.values())))) > 1:
        raise InputError(f"{data_dir}: train and val do not have the same classes ({counts}); add or remove class folders")
    folder = target.parent if target.suffix == ".beton" else target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cfg.write_path={target}: cannot be made ({error.strerror}); choose another") from error
    for name, source in sources.items():
        path = target if target.suffix == ".beton" else target / f"{name}.beton"
        written = write_beton(path, source.first(subset) if subset > 0 else source, Encoding(**encoding), num_workers,
                              chunk_size)
        print(f"{written['path']}: {written['samples']} images, {written['classes']} classes, "
              f"{written['bytes'] / 1e6:.1f} MB", flush=True)
