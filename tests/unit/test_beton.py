"""The .beton reader refuses every damaged or truncated file, with a one-line error."""

import numpy as np
import pytest

from rsb_ffcv import InputError, beton
from rsb_ffcv.ops import native


def test_layout_equals_ffcv():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )

    layouts = (beton.HEADER, beton.FIELD, beton.ALLOCATION)
    assert layouts == (HeaderType, FieldDescType, ALLOC_TABLE_TYPE)
    assert beton.VERSION == CURRENT_VERSION
    metadata = get_metadata_type([RGBImageField(), IntField()])
    assert metadata == beton.SAMPLE_METADATA


def test_reads_every_sample(betons):
    file = beton.read_beton(betons / "train.beton")
    assert len(file) == 96 and file.num_classes == 3
    assert np.bincount(file.labels).tolist() == [32, 32, 32]
    data = (betons / "train.beton").read_bytes()
    for pointer, size, (checksum, entry_bytes) in zip(
        file.pointers.tolist(), file.sizes.tolist(), file.extras.tolist()
    ):
        image = data[pointer : pointer + size]
        assert image[:2] == b"\xff\xd8" and image[-2:] == b"\xff\xd9" and entry_bytes > 0
        assert (
            native.checksum(np.frombuffer(data[pointer : pointer + size + entry_bytes], np.uint8))
            == checksum
        )


def extras_start(whole) -> int:
    """Offset in bytes of the part that only this project's files have."""
    header = np.frombuffer(whole, beton.HEADER, 1)[0]
    at = int(header["alloc_table_ptr"]) - beton.TRAILER.itemsize
    trailer = np.frombuffer(whole, beton.TRAILER, 1, at)[0]
    return (
        at
        - int(trailer["names_bytes"])
        - int(trailer["about_bytes"])
        - beton.EXTRA.itemsize * int(header["num_samples"])
    )


def as_ffcv_writes_it(path) -> bytes:
    """The file as FFCV would write it: without this project's part."""
    whole = bytearray(path.read_bytes())
    header = np.frombuffer(whole, beton.HEADER, 1)
    table = int(header["alloc_table_ptr"][0])
    header["alloc_table_ptr"] = extras_start(whole)
    return bytes(whole[: int(header["alloc_table_ptr"][0])] + whole[table:])


def test_file_without_checksums_reads_the_same(betons, tmp_path):
    (tmp_path / "stock.beton").write_bytes(as_ffcv_writes_it(betons / "val.beton"))
    stock, ours = beton.read_beton(tmp_path / "stock.beton"), beton.read_beton(betons / "val.beton")
    assert stock.extras is None
    for name in ("pointers", "sizes", "modes", "heights", "widths", "labels"):
        assert np.array_equal(getattr(stock, name), getattr(ours, name))


def test_every_bit_flip_outside_the_images_is_detected(betons, tmp_path):
    whole = np.fromfile(betons / "val.beton", np.uint8)
    fields_end = 24 + 2 * beton.FIELD.itemsize
    metadata_end = fields_end + 27 * beton.SAMPLE_METADATA.itemsize
    trailer = extras_start(whole)
    rng = np.random.default_rng(0)
    places = [
        *range(24),
        *rng.integers(24, metadata_end, 150),
        *range(trailer, trailer + beton.EXTRA.itemsize * 27 + 40, 3),
        *rng.integers(trailer, len(whole), 150),
    ]
    path = tmp_path / "flipped.beton"
    for place in places:
        damaged = whole.copy()
        damaged[place] ^= 1 << rng.integers(0, 8)
        damaged.tofile(path)
        with pytest.raises(InputError, match="flipped.beton"):
            beton.read_beton(path).names()


def test_truncated_file_is_rejected(betons, tmp_path):
    whole = (betons / "val.beton").read_bytes()
    cut = tmp_path / "cut.beton"
    for length in [
        *range(60),
        1000,
        2000,
        2100,
        2600,
        len(whole) // 2,
        len(whole) - 700,
        len(whole) - 1,
    ]:
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut.beton"):
            beton.read_beton(cut)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(5000), bytes(10000)]
)
def test_other_file_formats_are_rejected(tmp_path, content):
    path = tmp_path / "x.beton"
    path.write_bytes(content)
    with pytest.raises(InputError, match="x.beton"):
        beton.read_beton(path)
    with pytest.raises(InputError, match="no such|cannot be read"):
        beton.read_beton(tmp_path / "absent.beton")


def test_bit_flips_never_point_outside_the_file(betons, tmp_path):
    """In a file without checksums."""
    whole = np.frombuffer(as_ffcv_writes_it(betons / "val.beton"), np.uint8)
    header_end = 24 + 2 * beton.FIELD.itemsize + 27 * beton.SAMPLE_METADATA.itemsize
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.beton"
    rejected = 0
    for _ in range(300):
        damaged = whole.copy()
        region = int(rng.integers(0, 3))
        low, high = ((0, 24), (2100, header_end), (len(whole) - 27 * 24, len(whole)))[region]
        damaged[rng.integers(low, high)] ^= 1 << rng.integers(0, 8)
        damaged.tofile(path)
        try:
            file = beton.read_beton(path)
        except InputError:
            rejected += 1
            continue
        ends = [int(pointer) + int(size) for pointer, size in zip(file.pointers, file.sizes)]
        assert max(ends) <= len(whole) and file.labels.min() >= 0
    assert rejected > 100


@pytest.mark.parametrize(
    "field, value, rejected",
    [
        ("size", lambda row, length: length - int(row["ptr"]), False),
        ("size", lambda row, length: length - int(row["ptr"]) + 1, True),
        ("size", lambda row, length: 2**64 - int(row["ptr"]), True),
        ("size", lambda row, length: 0, True),
        ("ptr", lambda row, length: int(row["ptr"]) + 1, True),
    ],
)
def test_allocation_table_bounds_are_exact(betons, tmp_path, field, value, rejected):
    whole = bytearray(as_ffcv_writes_it(betons / "val.beton"))
    table = np.frombuffer(whole, beton.ALLOCATION, 27, len(whole) - 27 * 24)
    table[5][field] = value(table[5], len(whole))
    (tmp_path / "x.beton").write_bytes(whole)
    if rejected:
        with pytest.raises(InputError, match="damaged: sample 5 "):
            beton.read_beton(tmp_path / "x.beton")
    else:
        beton.read_beton(tmp_path / "x.beton")


def test_duplicate_field_names_are_rejected(betons, tmp_path):
    whole = bytearray(as_ffcv_writes_it(betons / "val.beton"))
    fields = np.frombuffer(whole, beton.FIELD, 2, 24)
    fields["name"][1] = fields["name"][0]
    (tmp_path / "twice.beton").write_bytes(whole)
    with pytest.raises(InputError, match="twice.beton: has two fields with one name"):
        beton.read_beton(tmp_path / "twice.beton")


def test_fingerprint_depends_on_pixels_and_labels(tmp_path):
    from rsb_ffcv.dataset import Encoding, storing
    from rsb_ffcv.dataset.sources import Source
    from rsb_ffcv.dataset.writer import write_beton

    def fingerprint(name, colour, labels):
        source = Source(
            classes=["a", "b"],
            names=list("0123"),
            labels=labels,
            read=lambda index: np.full((9, 9, 3), colour, np.uint8),
        )
        write_beton(
            tmp_path / name,
            source,
            store=storing(source, Encoding(mode="raw")),
            settings={},
            num_workers=1,
        )
        return beton.read_beton(tmp_path / name).fingerprint()

    first = fingerprint("1.beton", (1, 2, 3), [0, 1, 0, 1])
    assert first == fingerprint("2.beton", (1, 2, 3), [0, 1, 0, 1])
    assert first != fingerprint("3.beton", (1, 2, 4), [0, 1, 0, 1]) and first != fingerprint(
        "4.beton", (1, 2, 3), [0, 0, 1, 1]
    )
