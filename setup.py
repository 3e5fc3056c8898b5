"""Builds the compiled core, rsb_ffcv/ops/_native.abi3.so; everything else is said in
pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "rsb_ffcv.ops._native",
            sources=[
                f"rsb_ffcv/ops/csrc/{name}.c"
                for name in ("scratch", "checksum", "jpeg", "resample", "augment", "sample", "pool")
            ],
            depends=[f"rsb_ffcv/ops/csrc/{name}.h" for name in ("rsb", "jpeg_hot", "augment_hot")],
            libraries=["turbojpeg", "m"],
            # Signed overflow wraps (damaged JPEGs reach it), and products are not fused into sums:
            # Pillow's bits are reproduced.
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
            py_limited_api=True,  # plain C behind ctypes: one build serves every Python
        )
    ]
)
