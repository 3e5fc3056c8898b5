"""The `.beton` file: its layout, and a reader that checks every number before using it.

The layout is FFCV's, version 2 (libffcv/ffcv `ffcv/types.py`): a header, one descriptor per field,
one metadata row per sample, pages of sample data, and at the end a table of (sample, pointer,
size). FFCV reads such a file without checks, so a truncated file causes "negative dimensions are
not allowed" or a read past the end of the mapping. Here the header, the descriptors, the table and
each image's pointer and size are first compared with the length of the file, and a raw image's size
with its shape. The pointers of a `Beton` can therefore be passed to native code.

Files that this project writes contain more, in places that FFCV does not read. A JPEG is followed
by its entry points (`ops/csrc/jpeg_planes.c`), with which the decoder reaches a crop without
reading the image above it. Between the last page and the table are, in this order: an `EXTRA` for
each sample, in dataset order (checksum of image and entry points, size of the entry points); the
samples' names, UTF-8, zero-terminated; a description of the file, JSON (`About`); and a `TRAILER`.
FFCV's own files have none of these. In them, the pages end and the table begins at a multiple of
the page size. A missing trailer is therefore detected.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np

from rsb_ffcv import InputError
from rsb_ffcv.atomic import hidden
from rsb_ffcv.ops.native import checksum

# Declared here instead of imported: ffcv.types imports torch, numba and every field, and a check of
# a file's header must not take seconds. tests/unit/test_beton.py compares them with ffcv's.
VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_METADATA = np.dtype(
    [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]
)
LABEL_METADATA = np.dtype("<i8")
SAMPLE_METADATA = np.dtype([("f0", IMAGE_METADATA), ("f1", LABEL_METADATA)], align=True)
EXTRA = np.dtype([("checksum", "<u8"), ("entry_bytes", "<u4")])
# names_bytes, about_bytes: lengths in bytes. The other values are XXH64 checksums. samples: of the
# EXTRAs; structure: of header, descriptors, metadata and table; trailer: of the bytes before it
TRAILER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u8"),
        ("names_bytes", "<u8"),
        ("about_bytes", "<u8"),
        ("samples", "<u8"),
        ("names", "<u8"),
        ("about", "<u8"),
        ("structure", "<u8"),
        ("trailer", "<u8"),
    ]
)
MAGIC, TRAILER_VERSION = b"rsb_ffcv", 3
PAGE_BYTES = 1 << 23  # page size of the files written here: FFCV's default, 8 MiB
# types of fields, and their metadata: the value itself, or where the data is
(
    FLOAT_TYPE_ID,
    INT_TYPE_ID,
    IMAGE_TYPE_ID,
    BYTES_TYPE_ID,
    ARRAY_TYPE_ID,
    JSON_TYPE_ID,
    TENSOR_TYPE_ID,
) = range(7)
BYTES_METADATA = np.dtype([("ptr", "<u8"), ("size", "<u8")])
METADATA = {
    FLOAT_TYPE_ID: np.dtype("<f8"),
    INT_TYPE_ID: LABEL_METADATA,
    IMAGE_TYPE_ID: IMAGE_METADATA,
    BYTES_TYPE_ID: BYTES_METADATA,
    ARRAY_TYPE_ID: np.dtype("<u8"),
    JSON_TYPE_ID: BYTES_METADATA,
    TENSOR_TYPE_ID: np.dtype("<u8"),
}
ARRAY_SIDES = 32  # most dimensions of an array field
SCALARS = {FLOAT_TYPE_ID, INT_TYPE_ID}  # types without data outside the metadata
JPG, RAW = 0, 1
# More than any labelled set has. A larger label is damage; it would determine the size of the
# model's last layer
MAX_CLASSES = 1 << 20
AGAIN = "write it again with write_ffcv.py"


@dataclass(frozen=True, kw_only=True)
class About:
    """The description in a file. It is a function of the pictures and settings, not of place or
    time.

    tool: versions of the software that wrote the file
    settings: how images are stored
    source: kind of dataset, split, number of pictures, fingerprint of their names and labels
    classes: names in the order of the labels (wnids for ImageNet)
    titles: readable names of the classes, or empty
    counts: numbers of pictures kept unchanged, encoded, stored raw, left out
    """

    tool: dict
    settings: dict
    source: dict
    classes: list[str]
    titles: list[str]
    counts: dict

    def check(self) -> None:
        """Raises ValueError if a part has the wrong type. The text comes from a file, which may
        contain anything."""
        lists, tables = (
            (self.classes, self.titles),
            (self.tool, self.settings, self.source, self.counts),
        )
        if (
            not all(
                isinstance(part, list) and all(isinstance(name, str) for name in part)
                for part in lists
            )
            or not all(isinstance(part, dict) for part in tables)
            or len(self.titles) not in (0, len(self.classes))
            or not 0 < len(self.classes) <= MAX_CLASSES
            or len(set(self.classes)) < len(self.classes)
            or not all(isinstance(count, int) for count in self.counts.values())
            or not isinstance(self.source.get("split"), str | None)
            or not isinstance(self.source.get("appended", []), list)
            or not isinstance(self.settings.get("max_resolution", 0), int)
            or not isinstance(self.settings.get("of_parts", []), list)
        ):
            raise ValueError("not as write_ffcv.py writes it")


CustomType = Callable[[str, bytes], np.dtype | None]


class Field(NamedTuple):
    """One descriptor of a file.

    name: of the field.
    type_id: FFCV's number of its type: see `METADATA`.
    arguments: 1024 bytes, whose meaning depends on the type.
    """

    name: str
    type_id: int
    arguments: bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class Structure:
    """Everything in a file but the data of its samples, checked for consistency.

    path: the file
    num_bytes: its length
    fields: its descriptors
    metadata: records with one row per sample; field i is column f<i>
    table: ALLOCATION records, sorted by their pointers
    first: the first byte that may hold data
    extras: EXTRA records; None in a file that FFCV wrote
    about: the file's description; None in a file that FFCV wrote
    names_at: position of the names (first byte, length in bytes, XXH64); None in a file that FFCV
        wrote
    """

    path: Path
    num_bytes: int
    fields: list[Field]
    metadata: np.ndarray
    table: np.ndarray
    first: int
    extras: np.ndarray | None
    about: About | None
    names_at: tuple[int, int, int] | None

    def refuse(self, why: str, fix: str = AGAIN) -> NoReturn:
        """Raises InputError."""
        raise InputError(f"{self.path}: {why}; {fix}")

    def __len__(self) -> int:
        return len(self.metadata)

    @property
    def is_labelled(self) -> bool:
        """Whether it has the images and labels of a classifier."""
        kinds = {field.name: field.type_id for field in self.fields}
        return kinds.get("image") == IMAGE_TYPE_ID and kinds.get("label") == INT_TYPE_ID

    def column(self, name: str) -> np.ndarray:
        """The metadata of a field, one entry per sample."""
        return self.metadata[f"f{[field.name for field in self.fields].index(name)}"]

    def arrays(self, name: str) -> tuple[np.ndarray, np.dtype, tuple[int, ...]]:
        """The pointers, and the dtype and shape of each sample, of a field of arrays or tensors.
        Raises InputError if they are damaged."""
        field = next(field for field in self.fields if field.name == name)
        sides = np.frombuffer(field.arguments, "<u8", ARRAY_SIDES + 1)
        shape = tuple(side for side in sides[:-1].tolist() if side)
        at, length = sides.nbytes, int(sides[-1])
        try:
            ((_, kind),) = json.loads(field.arguments[at : at + length])
            dtype = np.dtype(kind)
        except (ValueError, TypeError, RecursionError):
            self.refuse(f"damaged: the type of the arrays {name!r} cannot be read")
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or not shape or size > self.num_bytes:
            self.refuse(f"damaged: has arrays {name!r} of {dtype} and shape {shape}")
        pointers = self.column(name)
        self.check_inside(name, pointers, np.uint64(size))
        return pointers, dtype, shape

    def texts(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The pointers, and the bytes of each sample, of a field of bytes or JSON, uint64. Raises
        InputError if one is outside the file."""
        column = self.column(name)
        self.check_inside(name, column["ptr"], column["size"])
        return column["ptr"], column["size"]

    def check_inside(self, name: str, pointers: np.ndarray, sizes: np.ndarray | np.uint64) -> None:
        """Raises InputError unless all data of the field `name` is in the file.

        sizes: uint64 bytes of each sample, or of all. A sample without data may point anywhere.
        """
        outside = (sizes > 0) & self.outside(pointers, sizes)
        self.refuse_any(outside, f"has {name!r} outside the file")

    def sizes(self, pointers: np.ndarray) -> np.ndarray:
        """uint64: the bytes that the file has for each of `pointers`, uint64. Raises InputError if
        one is not in the allocation table, or points outside the file."""
        known = self.table["ptr"]
        if np.array_equal(known, pointers) and (known[1:] > known[:-1]).all():
            sizes = self.table["size"].copy()  # one row per sample, in the same order
        else:
            rows = np.minimum(np.searchsorted(known, pointers), len(known) - 1)
            missing = known[rows] != pointers
            if missing.any():
                self.refuse(
                    f"damaged: sample {int(np.argmax(missing))} is not in the allocation table "
                    f"({int(missing.sum())} such samples)"
                )
            sizes = self.table["size"][rows]
        self.refuse_any(self.outside(pointers, sizes), "points outside the file")
        return sizes

    def outside(self, pointers: np.ndarray, sizes: np.ndarray | np.uint64) -> np.ndarray:
        """bool: whether the bytes at a pointer are not all in the file, behind its metadata."""
        end = int(pointers.max()) + int(sizes.max())
        if pointers.min() >= self.first and end <= self.num_bytes:  # the usual case, without copies
            return np.zeros(len(pointers), bool)
        # The subtraction is on the right side, where it cannot be negative: a sum of two 64-bit
        # numbers from the file could overflow
        return (
            (pointers < self.first)
            | (pointers > self.num_bytes)
            | (sizes > self.num_bytes - np.minimum(pointers, self.num_bytes))
        )

    def refuse_any(self, bad: np.ndarray, what: str) -> None:
        """Raises InputError if any of `bad`, bool with one entry per sample, is set."""
        if bad.any():
            self.refuse(
                f"damaged: sample {int(np.argmax(bad))} {what} ({int(bad.sum())} such samples)"
            )


def read_structure(
    path: str | Path, custom: CustomType = lambda name, arguments: None
) -> Structure:
    """Opens `path` and checks its structure: header, fields, metadata, table, checksums.

    custom: returns the metadata's dtype of a field, from its name and arguments, if its type is not
        FFCV's own; otherwise None.

    Raises InputError, which names the file and the fault: missing, not a .beton, truncated, damaged
    or with a field of another type.
    """
    path = Path(path)

    def refuse(why: str, fix: str = AGAIN) -> NoReturn:
        raise InputError(f"{path}: {why}; {fix}")

    try:
        num_bytes = os.stat(path).st_size
        with open(path, "rb") as file:
            if num_bytes < HEADER.itemsize:
                refuse(f"not a .beton file ({num_bytes} bytes, less than a header)")
            header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
            num_fields, num_samples = int(header["num_fields"]), int(header["num_samples"])
            if header["version"] != VERSION or not 0 < num_fields <= 64:
                refuse(
                    f"not a .beton file of version {VERSION} (version {header['version']}, "
                    f"{num_fields} fields)"
                )
            if num_samples == 0:
                refuse("contains no samples")
            table_start = int(header["alloc_table_ptr"])
            if table_start == 0:
                refuse("incomplete: its writer was interrupted")
            metadata_start = HEADER.itemsize + num_fields * FIELD.itemsize
            if metadata_start > num_bytes:
                refuse(f"truncated: {num_bytes} bytes end inside the field descriptors")
            descriptors = np.frombuffer(file.read(num_fields * FIELD.itemsize), FIELD)
            fields = [
                Field(
                    bytes(one["name"]).split(b"\0")[0].decode("ascii", "replace"),
                    int(one["type_id"]),
                    bytes(one["arguments"]),
                )
                for one in descriptors
            ]
            metadata_type = _metadata_type(fields, custom, refuse)
            metadata_end = metadata_start + num_samples * metadata_type.itemsize
            if metadata_end > num_bytes:
                refuse(
                    f"truncated: {num_bytes} bytes, and the metadata of {num_samples} samples end "
                    f"at {metadata_end}"
                )
            # The table may be empty if all values are in the metadata.
            paged = bool({field.type_id for field in fields} & set(METADATA) - SCALARS)
            needed = ALLOCATION.itemsize if paged else 0
            if (
                not metadata_end <= table_start <= num_bytes - needed
                or (num_bytes - table_start) % ALLOCATION.itemsize
            ):
                refuse(
                    f"truncated: {num_bytes} bytes do not contain the allocation table that "
                    f"starts at {table_start}"
                )
            # Both in one buffer, because one checksum covers them: copies of the structure of
            # millions of samples are large
            padding = -metadata_start % 8  # aligns the metadata
            buffer = np.empty(padding + metadata_end + num_bytes - table_start, np.uint8)[padding:]
            front, rest = np.split(buffer, [metadata_end])
            for part, start in ((front, 0), (rest, table_start)):
                file.seek(start)
                if file.readinto(part) < part.nbytes:
                    refuse("truncated: it became shorter while it was read")
            metadata, table = front[metadata_start:].view(metadata_type), rest.view(ALLOCATION)
            if (table["ptr"][1:] < table["ptr"][:-1]).any():
                table = table[np.argsort(table["ptr"], kind="stable")]
            extras, about, names_at = _read_extras(
                file,
                header,
                table_start=table_start,
                metadata_end=metadata_end,
                structure=checksum(buffer),
                paged=paged,
                refuse=refuse,
            )
    except OSError as error:
        if hidden(path, "appending").exists():
            refuse(
                "an append to it was interrupted",
                "run the same concat command again, which restores the file",
            )
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give the path of a .beton file"
        ) from error
    return Structure(
        path=path,
        num_bytes=num_bytes,
        fields=fields,
        metadata=metadata,
        table=table,
        first=metadata_end,
        extras=extras,
        about=about,
        names_at=names_at,
    )


def write_structure(
    path: str | Path,
    end: int,
    *,
    metadata: np.ndarray,
    table: np.ndarray,
    extras: np.ndarray,
    names: list[str],
    about: About,
    before_front: Callable[[bytes], object] = lambda front: None,
) -> None:
    """Writes everything around the images of a file: first what follows them, and after that is
    flushed to disk, the front (header, descriptors, metadata). Raises OSError.

    path: the file
    end: the byte at which its images end
    metadata, table, extras: SAMPLE_METADATA, ALLOCATION and EXTRA records, one per sample
    names: the samples' names
    about: the file's description
    before_front: called with the front before it is written
    """
    head = np.zeros(1, HEADER)
    head["version"], head["num_fields"], head["page_size"], head["num_samples"] = (
        VERSION,
        2,
        PAGE_BYTES,
        len(metadata),
    )
    fields = np.zeros(2, FIELD)
    for row, (name, type_id) in zip(fields, (("image", IMAGE_TYPE_ID), ("label", INT_TYPE_ID))):
        row["type_id"] = type_id
        row["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    text = "\0".join([*names, ""]).encode("utf-8", "surrogateescape")
    known = json.dumps(asdict(about), ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogateescape"
    )
    end += -end % PAGE_BYTES
    head["alloc_table_ptr"] = end + extras.nbytes + len(text) + len(known) + TRAILER.itemsize
    front = b"".join((head, fields, metadata))
    text_part, known_part = np.frombuffer(text, np.uint8), np.frombuffer(known, np.uint8)
    trailer = make_trailer(
        extras,
        len(text),
        names_checksum=checksum(text_part),
        about=known_part,
        structure=structure_checksum(front, table),
    )
    # Overwrites with zeros what was there before: it is no part of the file
    front += bytes(max(0, int(metadata["f0"]["data_ptr"].min()) - len(front)))
    with open(path, "r+b") as file:
        file.truncate(end)
        file.seek(end)
        for part in (extras, text, known, trailer, table):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        before_front(front)
        file.seek(0)
        file.write(front)
        file.flush()
        os.fsync(file.fileno())


def front_bytes(count: int) -> int:
    """Bytes of header, descriptors and metadata of a file with `count` samples written here."""
    return HEADER.itemsize + 2 * FIELD.itemsize + count * SAMPLE_METADATA.itemsize


def structure_checksum(front: bytes, table: np.ndarray) -> int:
    """The checksum of the file's structure. front: header, descriptors and metadata."""
    return checksum(np.frombuffer(b"".join((front, table)), np.uint8))


def make_trailer(
    extras: np.ndarray, names_bytes: int, *, names_checksum: int, about: np.ndarray, structure: int
) -> np.ndarray:
    """The TRAILER. about: uint8, the JSON of `About`; structure: result of structure_checksum."""
    trailer = np.array(
        [
            (
                MAGIC,
                TRAILER_VERSION,
                names_bytes,
                about.nbytes,
                checksum(extras),
                names_checksum,
                checksum(about),
                structure,
                0,
            )
        ],
        TRAILER,
    )
    trailer["trailer"] = checksum(trailer.view(np.uint8)[:-8])
    return trailer


def _read_extras(
    file: BinaryIO,
    header: np.void,
    *,
    table_start: int,
    metadata_end: int,
    structure: int,
    paged: bool,
    refuse: Callable[..., NoReturn],
) -> tuple[np.ndarray | None, About | None, tuple[int, int, int] | None]:
    """Returns (the samples' EXTRAs, About, position of the names), all None if FFCV wrote the
    file.

    file: the open file
    header: its HEADER
    table_start: first byte of the allocation table
    metadata_end: the byte after the metadata
    structure: its checksum, as of structure_checksum
    paged: whether the file has data outside its metadata
    refuse: raises InputError with a reason and, optionally, a fix
    """
    count = int(header["num_samples"])
    at, trailer = table_start - TRAILER.itemsize, np.zeros(1, TRAILER)
    if at >= metadata_end:
        file.seek(at)
        trailer = np.fromfile(file, TRAILER, 1)
    if trailer["magic"][0] != MAGIC:
        # FFCV starts no page if all values are in the metadata.
        if paged and (header["page_size"] == 0 or table_start % int(header["page_size"])):
            refuse(
                "damaged, or written before version 3 of this program's checksums: the checksums "
                "are not at the expected position"
            )
        return None, None, None
    if trailer["version"][0] != TRAILER_VERSION:
        refuse(
            f"has checksums of version {trailer['version'][0]}, and this program reads version "
            f"{TRAILER_VERSION}",
            "write it again with write_ffcv.py, or read it with the rsb_ffcv version that wrote it",
        )
    names_bytes, about_bytes = int(trailer["names_bytes"][0]), int(trailer["about_bytes"][0])
    start = at - EXTRA.itemsize * count - names_bytes - about_bytes
    damaged = "damaged: header, metadata, table or checksums changed after they were written"
    if start < metadata_end:
        refuse(damaged)
    file.seek(start)
    extras = np.fromfile(file, EXTRA, count)
    file.seek(at - about_bytes)
    known = np.fromfile(file, np.uint8, about_bytes)
    if (
        make_trailer(
            extras,
            names_bytes,
            names_checksum=trailer["names"][0],
            about=known,
            structure=structure,
        )
        != trailer
    ).any():
        refuse(damaged)
    try:
        about = About(**json.loads(known.tobytes().decode("utf-8", "surrogateescape")))
        about.check()
        "".join(about.classes + about.titles).encode("utf-8", "surrogateescape")
    except (ValueError, TypeError, RecursionError):
        refuse("its description cannot be read", "read it with the rsb_ffcv version that wrote it")
    return extras, about, (start + extras.nbytes, names_bytes, int(trailer["names"][0]))


def _metadata_type(
    fields: list[Field], custom: CustomType, refuse: Callable[..., NoReturn]
) -> np.dtype:
    """The dtype of a metadata row. Only fields of known width are accepted, because any other
    would shift the fields after it."""
    names = {field.name for field in fields}
    if len(names) < len(fields):
        refuse(f"has two fields with one name ({len(fields)} fields, {len(names)} names)")
    own = [custom(field.name, field.arguments) for field in fields]
    unknown = {field.type_id for field, kind in zip(fields, own) if kind is None} - set(METADATA)
    if unknown:
        refuse(
            f"has a field of unknown type {unknown}",
            "read it with `custom_fields` of rsb_ffcv.ffcv.Loader",
        )
    kinds = [METADATA[field.type_id] if kind is None else kind for field, kind in zip(fields, own)]
    return np.dtype([("", kind) for kind in kinds], align=True)
