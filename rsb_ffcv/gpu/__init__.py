"""Decoding and augmentation on a device: the kernels of `ops/csrc/shared`, a driver that runs them,
and the batches that they work on.

The host only reads, checks and packs the bytes of each crop (`ops/csrc/pack.c`). On a CPU, the same
kernels are emulated. The pixels are those of the CPU core, byte for byte.
"""
