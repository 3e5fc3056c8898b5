"""Decoding equals libjpeg-turbo's bit for bit, resampling equals Pillow's within one grey level,
and evaluation equals timm's."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from rsb_ffcv.loading import EvalLoader
from rsb_ffcv.ops import native
from rsb_ffcv.ops.crop import rows_first
from tests.images import KINDS, jpeg, photograph

FILTERS = {native.BILINEAR: Image.Resampling.BILINEAR, native.BICUBIC: Image.Resampling.BICUBIC}


def load(
    data: bytes, raw: bool, size, box, out, filter=native.BILINEAR, flip=0, stored=None, **fields
):
    sample = np.zeros((), native.SAMPLE)
    for name, value in dict(
        size=len(data) if stored is None else stored,
        raw=raw,
        height=size[0],
        width=size[1],
        box=box,
        filter=filter,
        flip=flip,
        **fields,
    ).items():
        sample[name] = value
    file = os.memfd_create("image")
    try:
        os.write(file, data)
        return native.load(file, sample, out)
    finally:
        os.close(file)


@pytest.mark.parametrize("kind", [*KINDS, "grey"])
def test_any_window_of_a_jpeg_equals_libjpeg_turbos(kind):
    """The output has the size of the window, so resampling does not change the decoded pixels. With
    and without entry points."""
    rng, entered_any = np.random.default_rng(1), False
    for trial in range(25):
        height, width = (int(side) for side in rng.integers(1, 300, 2))
        image = photograph(rng, height, width)
        options = {"quality": int(rng.integers(20, 99)), **KINDS.get(kind, {})}
        data, whole = jpeg(image[..., 0] if kind == "grey" else image, **options)
        entries = native.entry_points(np.frombuffer(data, np.uint8), height, width).tobytes()
        entered_any |= len(entries) > 0
        for _ in range(4):
            h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            for entered in (b"", entries):
                result = load(
                    data + entered,
                    False,
                    (height, width),
                    (top, left, h, w),
                    (h, w),
                    stored=len(data),
                    entry_bytes=len(entered),
                )
                assert np.array_equal(result, whole[top : top + h, left : left + w]), (
                    kind,
                    trial,
                    height,
                    width,
                    top,
                    left,
                    h,
                    w,
                )
    assert entered_any == (kind not in ("progressive", "restarts"))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("filter", FILTERS)
def test_a_resized_box_equals_pillows(raw, filter):
    rng = np.random.default_rng(filter)
    worst = 0.0
    for trial in range(60):
        height, width = (int(side) for side in rng.integers(20, 420, 2))
        data, whole = jpeg(photograph(rng, height, width), quality=90)
        h, w = rng.uniform(2, height), rng.uniform(2, width)
        top, left = rng.uniform(0, height - h), rng.uniform(0, width - w)
        if trial % 2:
            top, left, h, w = (int(number) for number in (top, left, max(h, 1), max(w, 1)))
        out = tuple(int(side) for side in rng.integers(1, 260, 2)) if trial % 3 else (160, 160)
        top, left, h, w = (float(np.float32(number)) for number in (top, left, h, w))
        reference = Image.fromarray(whole).resize(
            list(out[::-1]), FILTERS[filter], box=(left, top, left + w, top + h)
        )
        result = load(
            whole.tobytes() if raw else data,
            raw,
            (height, width),
            (top, left, h, w),
            out,
            filter,
            rows_first=rows_first(height, width, out_heights=out[0], out_widths=out[1]),
        )
        difference = np.abs(result.astype(int) - np.asarray(reference))
        assert (difference > 1).mean() < 0.005 and difference.max() <= 3, (
            trial,
            height,
            width,
            top,
            left,
            h,
            w,
            out,
        )
        worst = max(worst, (difference > 0).mean())
    assert worst < 0.1


def test_flip_mirrors_the_same_crop():
    rng = np.random.default_rng(0)
    data, _ = jpeg(photograph(rng, 90, 130), quality=90)
    for filter in FILTERS:
        plain, mirrored = (
            load(data, False, (90, 130), (3, 5, 70, 101), (64, 48), filter, flip) for flip in (0, 1)
        )
        assert np.array_equal(plain[:, ::-1], mirrored) and not np.array_equal(plain, mirrored)


def test_every_reason_to_refuse_an_image():
    rng = np.random.default_rng(0)
    image = photograph(rng, 60, 80)
    data, _ = jpeg(image, quality=90)
    box, size = (0, 0, 60, 80), (60, 80)
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([image, image[..., :1]]), "CMYK").save(buffer, "JPEG")
    for wrong, options, reason in (
        (data[: len(data) // 2], {}, "decodable"),
        (b"\xff\xd8" + bytes(500), {}, "decodable"),
        (b"", {"stored": 40}, "cannot be read"),
        (data, {"stored": len(data) + 1}, "cannot be read"),
        (data, {"stored": 0}, "decodable"),
        (data, {"verify": 1, "checksum": 1}, "checksum"),
        (buffer.getvalue(), {}, "neither greyscale nor RGB"),
    ):
        with pytest.raises(ValueError, match=reason):
            load(wrong, False, size, box, (32, 32), **options)
    for wrong_size in ((61, 80), (60, 79), (30, 40)):
        with pytest.raises(ValueError, match="height or width"):
            load(data, False, wrong_size, (0, 0, 20, 20), (32, 32))
    with pytest.raises(ValueError, match="height or width"):
        load(image.tobytes()[:-3], True, size, box, (32, 32))
    for wrong_box in (
        (-1, 0, 60, 80),
        (0, 0, 61, 80),
        (0, 0, 0, 80),
        (0, 0, float("nan"), 80),
        (50, 0, 20, 80),
        (0, 0, 60, float("inf")),
    ):
        with pytest.raises(ValueError, match="parameters"):
            load(data, False, size, wrong_box, (32, 32))
    with pytest.raises(ValueError, match="pixels"):
        load(data, False, (65535, 65535), (0, 0, 10, 10), (32, 32))


def test_a_truncated_stream_is_rejected_only_if_it_ends_before_the_window_does():
    """The decoder does not read what is below the window; the checksum detects damage there."""
    image = photograph(np.random.default_rng(0), 240, 240)
    data, whole = jpeg(image, quality=90)
    cut = data[: int(len(data) * 0.8)] + b"\xff\xd9"
    assert np.array_equal(load(cut, False, (240, 240), (0, 0, 100, 240), (100, 240)), whole[:100])
    with pytest.raises(ValueError, match="decodable"):
        load(cut, False, (240, 240), (140, 0, 100, 240), (100, 240))


def test_checksums_are_xxh64():
    """The test vectors of the xxHash specification's sanity checks, over a byte sequence from a
    multiplicative generator."""
    state, sequence = 2654435761, []
    for _ in range(222):
        sequence.append(state >> 56)
        state = state * 11400714785074694797 % 2**64
    data = np.array(sequence, np.uint8)
    for length, expected in (
        (0, 0xEF46DB3751D8E999),
        (1, 0xE934A84ADB052768),
        (4, 0x9136A0DCA57457EE),
        (14, 0x8282DCC4994E35C8),
        (222, 0xB641AE8CB691C174),
    ):
        assert native.checksum(data[:length].copy()) == expected, length


@pytest.mark.parametrize(
    "resolution, ratio, interpolation",
    [(64, 0.95, "bicubic"), (48, 0.875, "bilinear"), (40, 1.0, "bicubic")],
)
def test_evaluation_equals_timms(betons, pictures, resolution, ratio, interpolation):
    """timm's evaluation transform of the decoded image: resize the shorter side, crop the
    centre."""
    from rsb_ffcv.beton import read_beton

    file = read_beton(betons / "val.beton")
    transform = create_transform(
        resolution,
        is_training=False,
        interpolation=interpolation,
        crop_pct=ratio,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    data = (betons / "val.beton").read_bytes()
    images = torch.cat(
        [
            images
            for images, *_ in EvalLoader(
                betons / "val.beton",
                batch_size=8,
                resolution=resolution,
                num_workers=2,
                crop_ratio=ratio,
                interpolation=interpolation,
            )
        ]
    )
    for ours, pointer, size in zip(images, file.pointers.tolist(), file.sizes.tolist()):
        picture = Image.open(io.BytesIO(data[pointer : pointer + size])).convert("RGB")
        theirs = (transform(picture) * 255).round().permute(1, 2, 0)
        difference = (ours - theirs).abs()
        assert difference.max() <= 2 and (difference > 1).float().mean() < 0.005
