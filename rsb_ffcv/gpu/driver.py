"""Runs the device kernels: on a GPU, compiled at start by torch's NVRTC, or emulated on a CPU."""

import ctypes
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rsb_ffcv import InputError, first_line
from rsb_ffcv.ops.native import CSRC, library

# Kernels in the order of csrc/shared/kernels.h, with the threads of a block
ENTROPY, IDCT, PIXELS, TAPS, FIRST_PASS, SECOND_PASS, AUGMENT = range(7)
NAMES = ("entropy", "idct", "pixels", "taps", "first_pass", "second_pass", "augment")
THREADS = (128, 256, 256, 256, 256, 256, 512)
FIX = "use `decode`=cpu"


class Driver(Protocol):
    """Runs a kernel."""

    def launch(self, kernel: int, argument: np.ndarray, blocks: int) -> None:
        """Runs `kernel` after the work that was submitted before.

        argument: a LAUNCH record.
        blocks: the number of all blocks of its `starts`.
        """


class Emulator:
    """Runs the kernels on the CPU. order: of the threads of a block, see rsb_emulate of
    csrc/rsb.h."""

    def __init__(self, order: int = 0) -> None:
        self.order = order

    def launch(self, kernel: int, argument: np.ndarray, blocks: int) -> None:
        status = library.rsb_emulate(kernel, argument.ctypes.data, self.order)
        assert status == 0, status


class Cuda:
    """Runs the kernels on a GPU, on torch's current stream.

    Raises InputError if they cannot be compiled for the device or loaded. `launch` raises
    RuntimeError, as torch does.
    """

    def __init__(self, device: torch.device) -> None:
        driver = bindings("driver")
        torch.cuda.init()
        self._driver = driver
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).synchronize()  # creates the context
            self._load(compile_for(*torch.cuda.get_device_capability(device))[0])

    def _load(self, image: bytes) -> None:
        try:
            self._module = self._call(self._driver.cuModuleLoadData, image)
            self._functions = [
                self._call(self._driver.cuModuleGetFunction, self._module, b"rsb_" + name.encode())
                for name in NAMES
            ]
        except RuntimeError as error:
            raise InputError(
                f"`decode`=gpu: {error}; update the NVIDIA driver if it is older than CUDA "
                f"{torch.version.cuda}, or {FIX}"
            ) from error

    def _call(self, function: Any, *arguments: object) -> Any:
        status, *results = function(*arguments)
        if status:
            text = self._driver.cuGetErrorString(status)[1]
            raise RuntimeError(f"{function.__name__} failed ({text.decode() if text else status})")
        return results[0] if results else None

    def launch(self, kernel: int, argument: np.ndarray, blocks: int) -> None:
        pointers = (ctypes.c_void_p * 1)(argument.ctypes.data)
        self._call(
            self._driver.cuLaunchKernel,
            self._functions[kernel],
            *(blocks, 1, 1),
            *(THREADS[kernel], 1, 1),
            0,
            torch.cuda.current_stream().cuda_stream,
            ctypes.addressof(pointers),
            0,
        )


def bindings(name: str) -> Any:
    """The module cuda.bindings.`name`. Raises InputError if it is not installed."""
    try:
        return import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise InputError(
            f"`decode`=gpu: cuda-bindings cannot be imported ({first_line(error)}); install it "
            f"with `pip install cuda-bindings`, or {FIX}"
        ) from error


@cache
def compile_for(major: int, minor: int, ptx: bool = False) -> tuple[bytes, str]:
    """Compiles the kernels for a compute capability. Returns a cubin and the compiler's log.

    ptx: return PTX instead, which the driver compiles. It does also if the device is newer than
        NVRTC.

    Raises InputError if NVRTC cannot compile them for the device.
    """
    nvrtc = bindings("nvrtc")

    def call(function: Any, *arguments: object) -> Any:
        try:
            status, *results = function(*arguments)
        except RuntimeError as error:  # its library cannot be loaded
            raise InputError(
                f"`decode`=gpu: NVRTC cannot be loaded ({first_line(error)}); install "
                f"nvidia-cuda-nvrtc, or {FIX}"
            ) from error
        if status:
            raise InputError(f"`decode`=gpu: {function.__name__} failed ({status.name}); {FIX}")
        return results[0] if results else None

    wanted = 10 * major + minor
    known = [arch for arch in call(nvrtc.nvrtcGetSupportedArchs) if arch <= wanted]
    if not known:
        raise InputError(
            f"`decode`=gpu: NVRTC does not support GPUs of compute capability {major}.{minor}; "
            f"{FIX}"
        )
    exact = known[-1] == wanted and not ptx
    headers = sorted((CSRC / "shared").glob("*.h"))
    source = (Path(__file__).parent / "kernels.cu").read_bytes()
    program = call(
        nvrtc.nvrtcCreateProgram,
        source,
        b"kernels.cu",
        len(headers),
        [header.read_bytes() for header in headers],
        [header.name.encode() for header in headers],
    )
    options = [
        f"--gpu-architecture={'sm' if exact else 'compute'}_{known[-1]}".encode(),
        # products must not be fused into sums: the results are the CPU core's to the bit
        b"--fmad=false",
    ]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    buffer = bytes(call(nvrtc.nvrtcGetProgramLogSize, program))
    call(nvrtc.nvrtcGetProgramLog, program, buffer)
    log = buffer.rstrip(b"\0").decode()
    if status:
        raise InputError(
            f"`decode`=gpu: the kernels cannot be compiled for compute capability {major}.{minor} "
            f"({status.name}: {log.strip().partition(chr(10))[0]}); {FIX}"
        )
    size_of, get = (
        (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        if exact
        else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    )
    image = bytes(call(size_of, program))
    call(get, program, image)
    return image, log
