"""The options of write_ffcv.py: one frozen dataclass a command, all in the section `cfg`.

Names of libffcv/ffcv-imagenet's writer keep their names and meaning.
"""

from dataclasses import dataclass

from rsb_ffcv.config.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class Source:
    """where images come from and how they are stored"""

    dataset: str = option(
        "imagenet",
        "what data_dir holds. imagenet: <split>/<class>/<image>, as folders or in a tar; "
        "imagenet_archives: the official tars and devkit; kaggle: the CLS-LOC layout; webdataset, "
        "parquet: shards; "
        "datasets: a name on the Hugging Face hub; csv, callable: path,label lists; cifar: "
        "cifar10; the others by "
        "their layout",
        choices=(
            "imagenet",
            "imagenet_archives",
            "kaggle",
            "webdataset",
            "parquet",
            "datasets",
            "csv",
            "callable",
            "tiny_imagenet",
            "cifar",
            "cifar10",
            "cifar100",
            "imagenette",
            "demo",
        ),
    )
    split: str = option("", "train or val; empty: both", choices=("", "train", "val"))
    data_dir: str = option(
        REQUIRED,
        "folder of the images, a file or pattern of shards ({split}, {000..147}, {a,b}, *), or any "
        "fsspec URL (cifar, imagenette and demo are put there)",
    )
    write_mode: str = option(
        "jpg",
        "jpg, raw, smart (jpg where raw exceeds smart_threshold) or proportion",
        choices=("jpg", "raw", "smart", "proportion"),
    )
    max_resolution: int = option(
        0, "longer side in pixels that larger images are shrunk to; 0: keep", low=0, high=65535
    )
    pass_through: bool = option(
        True, "JPEGs that need no change keep their bytes; 0: encode all anew"
    )
    num_workers: int = option(16, "threads that read and encode", low=1, high=1024)
    chunk_size: int = option(
        100, "images that may be encoded ahead of the writing", low=1, high=100000
    )
    jpeg_quality: int = option(90, "of images that are encoded (chroma 4:2:0)", low=1, high=100)
    subset: int = option(-1, "first images of each split to use; -1: all", low=-1)
    compress_probability: float = option(
        0.5, "proportion: share of images stored as JPEG", low=0, high=1
    )
    smart_threshold: int = option(3 * 256 * 256, "smart: largest image stored raw, in bytes", low=0)
    max_pixels: int = option(
        100_000_000,
        "pictures with more pixels are refused before they are decoded",
        low=1,
        high=2**28,
    )
    follow_links: bool = option(False, "read symbolic links that leave data_dir")
    class_names: str = option(
        "", "text file of the classes' names, one a line, where the source has numbers only"
    )
    callable: str = option(
        "",
        "dataset=callable: module:function, which takes a split and gives (path, label) pairs",
    )
    image_column: str = option(
        "", "parquet, datasets: column of the images; empty: image, or the only one that fits"
    )
    label_column: str = option(
        "", "parquet, datasets: column of the labels; empty: label, or the only one that fits"
    )


@dataclass(frozen=True, kw_only=True)
class Write(Source):
    """writing .beton files"""

    write_path: str = option(REQUIRED, "the .beton file, or a folder for train.beton and val.beton")
    on_error: str = option(
        "fail",
        "a picture that cannot be used: end, or skip: leave it out, and name it in the report",
        choices=("fail", "skip"),
    )
    max_skipped: float = option(
        0.01, "skip: end where more than this share is left out", low=0, high=1
    )
    report: str = option(
        "",
        "skip: CSV file of path, class and reason (of two splits: with .train and .val before its "
        "suffix); "
        "empty: <file>.skipped.csv",
    )


_PATH = "the .beton file"
_WORKERS = option(16, "threads", low=1, high=1024)


@dataclass(frozen=True, kw_only=True)
class Info:
    """what a file holds"""

    path: str = option(REQUIRED, _PATH)


@dataclass(frozen=True, kw_only=True)
class Verify:
    """whether a file is sound"""

    path: str = option(REQUIRED, _PATH)
    decode: float = option(
        1.0, "share of the images that are decoded; checksums are compared of all", low=0, high=1
    )
    num_workers: int = _WORKERS
    report: str = option("", "CSV file of sample, path and reason; empty: none")


@dataclass(frozen=True, kw_only=True)
class Show:
    """a contact sheet"""

    path: str = option(REQUIRED, _PATH)
    write_path: str = option(REQUIRED, "the PNG file")
    samples: str = option(
        "", "numbers and ranges of samples, such as 0-7,200; empty: some, spread evenly"
    )
    classes: str = option("", "classes by name or number, separated by commas: their first samples")
    count: int = option(
        16, "how many are shown, of each class where classes are given", low=1, high=1000
    )
    recipe: str = option(
        "",
        "YAML file of a training recipe: beside each image, what its augmentation makes of it",
    )
    epochs: int = option(5, "recipe: in so many epochs", low=1, high=100)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """one file of several"""

    paths: str = option(REQUIRED, ".beton files, separated by commas")
    write_path: str = option(REQUIRED, "the new .beton file")
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class Subset:
    """some samples of a file"""

    path: str = option(REQUIRED, _PATH)
    write_path: str = option(REQUIRED, "the new .beton file")
    classes: str = option(
        "",
        "classes by name or number, separated by commas; they are numbered anew. Empty: all",
    )
    samples: str = option("", "numbers and ranges of samples, such as 0-99,200; empty: all")
    per_class: int = option(0, "the first so many of each class; 0: all", low=0)
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class Shard:
    """a file in parts"""

    path: str = option(REQUIRED, _PATH)
    write_path: str = option(REQUIRED, "folder for the parts, <name>-00000-of-00008.beton")
    shards: int = option(REQUIRED, "how many", low=1, high=100000)
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class Concat:
    """files behind a file"""

    path: str = option(REQUIRED, "the .beton file to append to")
    paths: str = option(REQUIRED, ".beton files, separated by commas")
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class Export:
    """images as files again"""

    path: str = option(REQUIRED, _PATH)
    write_path: str = option(REQUIRED, "new folder, for <class>/<image>")
    num_workers: int = _WORKERS
