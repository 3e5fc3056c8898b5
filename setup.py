"""Builds the compiled core, rsb_ffcv/ops/_native.abi3.so, and adapts README.md to package indexes.
Everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, setup

FOLDER = "rsb_ffcv/ops/csrc"
SOURCES = (
    "scratch",
    "checksum",
    "jpeg_huffman",
    "jpeg_unstuff",
    "jpeg_headers",
    "jpeg_planes",
    "jpeg_pixels",
    "jpeg",
    "taps",
    "resample",
    "affine",
    "augment",
    "sample",
    "pack",
    "emulate",
    "pool",
)
HEADERS = (
    "rsb",
    "jpeg",
    "jpeg_entropy_hot",
    "jpeg_idct_hot",
    "jpeg_planes_hot",
    "jpeg_pixels_hot",
    "jpeg_unstuff_hot",
    "taps",
    "augment",
    "affine_hot",
    "augment_hot",
    "dispatch",
    "sample",
    "shared/base",
    "shared/jpeg_terms",
    "shared/filters",
    "shared/pillow",
    "shared/packed",
    "shared/entropy",
    "shared/idct",
    "shared/pixels",
    "shared/resample",
    "shared/augment",
    "shared/kernels",
)


def description() -> str:
    """README.md without its pictures, and without links to files of the repository: a package index
    shows it, but has none of these files."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\([^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    # The core is plain C, called with ctypes: one wheel fits every CPython from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    ext_modules=[
        Extension(
            "rsb_ffcv.ops._native",
            sources=[f"{FOLDER}/{name}.c" for name in SOURCES],
            depends=[f"{FOLDER}/{name}.h" for name in HEADERS],
            libraries=["turbojpeg", "m"],
            # Signed overflow wraps, because damaged JPEGs cause it. Products are not fused into
            # sums, because the results are Pillow's to the bit.
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-fwrapv",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-pthread",
                "-Wall",
                "-Wextra",
            ],
            extra_link_args=["-pthread"],
            py_limited_api=True,
        )
    ],
)
