"""The options of write_ffcv.py: one frozen dataclass per command, all in the section `cfg`.

Options that the writer of libffcv/ffcv-imagenet has keep their names and meaning.
"""

from dataclasses import dataclass

from rsb_ffcv.config.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """where images come from and how they are stored"""

    dataset: str = option(
        "imagenet",
        "content of data_dir. imagenet: <split>/<class>/<image>, in folders or in a tar; "
        "imagenet_archives: the official tars and devkit; kaggle: the CLS-LOC layout; webdataset, "
        "parquet: shards; datasets: a name on the Hugging Face hub; csv, callable: path,label "
        "lists; cifar: same as cifar10; tiny_imagenet, cifar100, imagenette, demo: the dataset of "
        "that name",
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
    val_share: float = option(
        0.0,
        "share of each class that goes to val, below 1, if the images have no val split "
        "(<class>/<image>); 0: they have both splits",
        low=0,
        high=1,
    )
    data_dir: str = option(
        REQUIRED,
        "folder of the images, a file or pattern of shards ({split}, {000..147}, {a,b}, *), or "
        "any fsspec URL (missing files of cifar and imagenette are downloaded to it, "
        "those of demo are generated)",
    )
    write_mode: str = option(
        "jpg",
        "jpg, raw, smart (jpg if raw exceeds smart_threshold) or proportion",
        choices=("jpg", "raw", "smart", "proportion"),
    )
    max_resolution: int = option(
        0,
        "longer side in pixels that larger images are shrunk to; 0: keep sizes",
        low=0,
        high=65535,
    )
    pass_through: bool = option(
        True, "JPEGs that need no change keep their bytes; 0: encode all images"
    )
    num_workers: int = option(16, "threads that read and encode", low=1, high=1024)
    chunk_size: int = option(
        100, "maximum number of encoded images that wait to be written", low=1, high=100000
    )
    jpeg_quality: int = option(
        90, "quality of images that are encoded (chroma 4:2:0)", low=1, high=100
    )
    subset: int = option(
        -1, "number of images to use, from the start of each split; -1: all", low=-1
    )
    compress_probability: float = option(
        0.5, "proportion: share of images stored as JPEG", low=0, high=1
    )
    smart_threshold: int = option(
        3 * 256 * 256, "smart: size of the largest image stored raw, in bytes", low=0
    )
    max_pixels: int = option(
        100_000_000,
        "pictures with more pixels are rejected before they are decoded",
        low=1,
        high=2**28,
    )
    follow_links: bool = option(False, "read symbolic links that leave data_dir")
    class_names: str = option(
        "", "text file of class names, one per line, if the source has only numbers"
    )
    callable: str = option(
        "",
        "dataset=callable: module:function that takes a split and returns (path, label) pairs",
    )
    image_column: str = option(
        "", "parquet, datasets: column of the images; empty: image, or the only matching column"
    )
    label_column: str = option(
        "", "parquet, datasets: column of the labels; empty: label, or the only matching column"
    )


@dataclass(frozen=True, kw_only=True)
class WriteOptions(SourceOptions):
    """writing .beton files"""

    write_path: str = option(REQUIRED, "the .beton file, or a folder for train.beton and val.beton")
    on_error: str = option(
        "fail",
        "if a picture cannot be used: end with an error (fail), or leave it out and list it in "
        "the report (skip)",
        choices=("fail", "skip"),
    )
    max_skipped: float = option(
        0.01, "skip: end with an error if more than this share is left out", low=0, high=1
    )
    report: str = option(
        "",
        "skip: CSV file of path, class and reason (for two splits, .train and .val are inserted "
        "before its suffix); empty: <file>.skipped.csv",
    )


_PATH = "the .beton file"
_WORKERS = option(16, "number of threads", low=1, high=1024)


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """printing the content of a file"""

    path: str = option(REQUIRED, _PATH)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """checking a file"""

    path: str = option(REQUIRED, _PATH)
    decode: float = option(
        1.0, "share of the images to decode; all checksums are compared", low=0, high=1
    )
    num_workers: int = _WORKERS
    report: str = option("", "CSV file of sample, path and reason; empty: none")


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """drawing a contact sheet"""

    path: str = option(REQUIRED, _PATH)
    write_path: str = option(REQUIRED, "the PNG file, <name>.png")
    samples: str = option(
        "", "numbers and ranges of samples, such as 0-7,200; empty: spread evenly over the file"
    )
    classes: str = option(
        "", "classes by name or number, separated by commas: show their first samples"
    )
    count: int = option(
        16, "number of images to show; with classes, of each class", low=1, high=1000
    )
    recipe: str = option(
        "",
        "YAML file of a training recipe: show each image also as the recipe augments it",
    )
    epochs: int = option(0, "recipe: number of epochs to show; 0: 5", low=0, high=100)


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """merging files into a new one"""

    paths: str = option(REQUIRED, ".beton files, separated by commas")
    write_path: str = option(REQUIRED, "the new .beton file")
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class SubsetOptions:
    """writing some samples of a file to a new one"""

    path: str = option(REQUIRED, _PATH)
    write_path: str = option(REQUIRED, "the new .beton file")
    classes: str = option(
        "",
        "classes by name or number, separated by commas; they are renumbered. Empty: all",
    )
    samples: str = option("", "numbers and ranges of samples, such as 0-99,200; empty: all")
    per_class: int = option(0, "number of samples to keep per class, from its start; 0: all", low=0)
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """splitting a file into parts"""

    path: str = option(REQUIRED, _PATH)
    write_path: str = option(REQUIRED, "folder for the parts, <name>-00000-of-00008.beton")
    shards: int = option(REQUIRED, "number of parts", low=1, high=100000)
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class ConcatOptions:
    """appending files to a file"""

    path: str = option(REQUIRED, "the .beton file to append to")
    paths: str = option(REQUIRED, ".beton files, separated by commas")
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """exporting images to files"""

    path: str = option(REQUIRED, _PATH)
    write_path: str = option(REQUIRED, "new folder for <class>/<image>")
    num_workers: int = _WORKERS
