"""The `.beton` file: its layout, and a reader that checks every number before anything follows it.

The layout is FFCV's, version 2 (libffcv/ffcv `ffcv/types.py`): a header, one descriptor a field, one metadata row a
sample, pages of sample data, and at the end a table of (sample, pointer, size). FFCV reads such a file without a
check, so a truncated one surfaces as "negative dimensions are not allowed" or as a read past the mapping. Here the
header, the descriptors, the table and each image's pointer and size are held against the file's length first, and a raw
image's size against its shape; whoever holds a `Beton` may hand its pointers to native code.

Files that this project writes carry more, in places that FFCV does not look at. After a JPEG's bytes stand its entry points
(`ops/csrc/jpeg.c`), by which the decoder reaches a crop without reading what lies above it. Between the last page and the
table stand an `EXTRA` for each sample, in dataset order (checksum of image and entry points, how long the latter are), and
a `TRAILER`. FFCV's own files have none of this; theirs end pages and begin tables at a multiple of the page size, so that a
trailer that is gone is noticed.
"""
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsb_ffcv import InputError
from rsb_ffcv.ops.native import checksum

# Declared here rather than imported: ffcv.types pulls in torch, numba and every field, and a check of a file's
# header must not cost seconds. tests/unit/test_beton.py holds them equal to ffcv's own.
VERSION = 2
HEADER = np.dtype([("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"),
                   ("alloc_table_ptr", "<u8")], align=True)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_METADATA = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
LABEL_METADATA = np.dtype("<i8")
SAMPLE_METADATA = np.dtype([("f0", IMAGE_METADATA), ("f1", LABEL_METADATA)], align=True)
EXTRA = np.dtype([("checksum", "<u8"), ("entry_bytes", "<u4")])
# XXH64 throughout. samples: of the EXTRAs; structure: of header, descriptors, metadata and table; trailer: of the bytes before it
TRAILER = np.dtype([("magic", "S8"), ("version", "<u8"), ("samples", "<u8"), ("structure", "<u8"), ("trailer", "<u8")])
MAGIC, TRAILER_VERSION = b"rsb_ffcv", 2
INT_TYPE_ID, IMAGE_TYPE_ID = 1, 2
JPG, RAW = 0, 1
MAX_CLASSES = 1 << 20  # beyond any labelled set: a larger label is damage, and would size the model's last layer


@dataclass(frozen=True, eq=False)
class Beton:
    """An image file whose every pointer has been checked. Arrays have one entry a sample, in dataset order.

    pointers, sizes: uint64, bytes from the file's start / bytes of the stored image.
    modes: uint8, `JPG` or `RAW`. heights, widths: uint16, pixels. labels: int64, 0 or more.
    extras: EXTRA records; None in a file of FFCV's.
    """
    path: Path
    num_bytes: int
    pointers: np.ndarray
    sizes: np.ndarray
    modes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    labels: np.ndarray
    extras: np.ndarray | None

    def __len__(self):
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Largest label + 1."""
        return int(self.labels.max()) + 1

    def fingerprint(self) -> str:
        """Tells apart files with other images, labels or order; the same for a copy under another name."""
        parts = [self.pointers, self.sizes, self.labels.astype(np.uint64)]
        if self.extras is not None:
            parts.append(self.extras["checksum"])
        return f"{checksum(np.concatenate(parts)):016x}"


def read_beton(path) -> Beton:
    """Opens `path` and checks it whole: header, fields, table, and each image's pointer, size and shape.

    Raises InputError naming the file and what is wrong with it: missing, not a .beton, truncated, without an image
    and an int field named `image` and `label`, or with a sample that points outside the file.
    """
    path = Path(path)

    def refuse(why, mend="write it again with write_ffcv.py"):
        raise InputError(f"{path}: {why}; {mend}")

    try:
        num_bytes = os.stat(path).st_size
        with open(path, "rb") as file:
            if num_bytes < HEADER.itemsize:
                refuse(f"not a .beton file ({num_bytes} bytes, less than a header)")
            header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
            num_fields, num_samples = int(header["num_fields"]), int(header["num_samples"])
            if header["version"] != VERSION or not 0 < num_fields <= 64:
                refuse(f"not a .beton file of version {VERSION} (version {header['version']}, {num_fields} fields)")
            if num_samples == 0:
                refuse("holds no sample")
            table_start = int(header["alloc_table_ptr"])
            if table_start == 0:
                refuse("incomplete: its writer was stopped before the end")
            metadata_start = HEADER.itemsize + num_fields * FIELD.itemsize
            if metadata_start > num_bytes:
                refuse(f"truncated: {num_bytes} bytes end inside the field descriptors")
            fields = np.frombuffer(file.read(num_fields * FIELD.itemsize), FIELD)
            metadata_type = _metadata_type(fields, refuse)
            metadata_end = metadata_start + num_samples * metadata_type.itemsize
            if metadata_end > num_bytes:
                refuse(f"truncated: {num_bytes} bytes, and the metadata of {num_samples} samples end at {metadata_end}")
            metadata = np.fromfile(file, metadata_type, num_samples)
            if not metadata_end <= table_start < num_bytes or (num_bytes - table_start) % ALLOCATION.itemsize:
                refuse(f"truncated: {num_bytes} bytes do not hold the allocation table that starts at {table_start}")
            file.seek(table_start)
            table = np.fromfile(file, ALLOCATION)
            file.seek(0)
            structure = structure_checksum(file.read(metadata_end), table)
            extras = _read_extras(file, header, table_start, metadata_end, structure, refuse)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a .beton file") from error

    names = [bytes(name).split(b"\0")[0] for name in fields["name"]]
    image, labels = metadata[f"f{names.index(b'image')}"], metadata[f"f{names.index(b'label')}"]
    pointers = image["data_ptr"].astype(np.uint64)
    sizes = _image_sizes(pointers, table, refuse)
    stored = sizes if extras is None else sizes + extras["entry_bytes"]
    heights, widths = (image[side].astype(np.uint16) for side in ("height", "width"))
    modes = image["mode"].copy()

    # Compared as `size > room` with room >= 0, so that no sum of two file-supplied 64-bit numbers can wrap around.
    outside = (pointers < metadata_end) | (pointers > num_bytes) | (stored > num_bytes - np.minimum(pointers, num_bytes))
    outside |= stored < sizes
    raw_bytes = heights.astype(np.uint64) * widths * 3
    for bad, what in ((outside, "points outside the file"), ((heights == 0) | (widths == 0), "has no pixels"),
                      (modes > RAW, "has an unknown storage mode"), (sizes == 0, "has no data"),
                      ((modes == RAW) & (sizes != raw_bytes), "has a size that is not height x width x 3"),
                      ((labels < 0) | (labels >= MAX_CLASSES), f"has a label outside 0 .. {MAX_CLASSES - 1}")):
        if bad.any():
            refuse(f"damaged: sample {int(np.argmax(bad))} {what} ({int(bad.sum())} such samples)")
    return Beton(path, num_bytes, pointers, sizes, modes, heights, widths, np.ascontiguousarray(labels), extras)


def structure_checksum(front: bytes, table: np.ndarray) -> int:
    """Of everything that is not image data. front: header, descriptors and metadata."""
    return checksum(np.frombuffer(front + table.tobytes(), np.uint8))


def make_trailer(extras: np.ndarray, structure: int) -> np.ndarray:
    """The TRAILER that follows the `extras`."""
    trailer = np.array([(MAGIC, TRAILER_VERSION, checksum(extras), structure, 0)], TRAILER)
    trailer["trailer"] = checksum(trailer.view(np.uint8)[:-8])
    return trailer


def _read_extras(file, header, table_start, metadata_end, structure, refuse):
    """The samples' EXTRAs, or None where the file is one of FFCV's."""
    count = int(header["num_samples"])
    start = table_start - TRAILER.itemsize - EXTRA.itemsize * count
    trailer = np.zeros(1, TRAILER)
    if start >= metadata_end:
        file.seek(table_start - TRAILER.itemsize)
        trailer = np.fromfile(file, TRAILER, 1)
    if trailer["magic"][0] != MAGIC:
        if header["page_size"] == 0 or table_start % int(header["page_size"]):
            refuse("damaged: its checksums are not where they should be")
        return None
    if trailer["version"][0] != TRAILER_VERSION:
        refuse(f"has checksums of version {trailer['version'][0]}, and this program knows {TRAILER_VERSION}",
               "write it again with write_ffcv.py, or read it with the rsb_ffcv that wrote it")
    file.seek(start)
    extras = np.fromfile(file, EXTRA, count)
    if (make_trailer(extras, structure) != trailer).any():
        refuse("damaged: header, metadata, table or checksums are not as they were written")
    return extras


def _metadata_type(fields, refuse):
    """The dtype of a metadata row. Only fields of known width are accepted: any other would shift what follows."""
    widths = {0: np.dtype("<f8"), INT_TYPE_ID: LABEL_METADATA, IMAGE_TYPE_ID: IMAGE_METADATA,
              3: np.dtype([("ptr", "<u8"), ("size", "<u8")]), 4: np.dtype("<u8"),
              5: np.dtype([("ptr", "<u8"), ("size", "<u8")]), 6: np.dtype("<u8")}
    found = {bytes(field["name"]).split(b"\0")[0]: int(field["type_id"]) for field in fields}
    if len(found) < len(fields):
        refuse(f"has two fields of one name ({len(fields)} fields, {len(found)} names)")
    if found.get(b"image") != IMAGE_TYPE_ID or found.get(b"label") != INT_TYPE_ID:
        refuse(f"needs an image field 'image' and an int field 'label', has "
               f"{ {name.decode('ascii', 'replace'): kind for name, kind in found.items()} }")
    unknown = set(found.values()) - set(widths)
    if unknown:
        refuse(f"has a field of unknown type {unknown}")
    return np.dtype([("", widths[int(field["type_id"])]) for field in fields], align=True)


def _image_sizes(pointers, table, refuse):
    """Stored bytes of each image: its pointer looked up in the allocation table."""
    table = table[np.argsort(table["ptr"], kind="stable")]
    rows = np.minimum(np.searchsorted(table["ptr"], pointers), len(table) - 1)
    missing = table["ptr"][rows] != pointers
    if missing.any():
        refuse(f"damaged: sample {int(np.argmax(missing))} is not in the allocation table "
               f"({int(missing.sum())} such samples)")
    return table["size"][rows].copy()
