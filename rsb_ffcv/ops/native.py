"""libffcv's C functions as symbols that numba kernels may call and still be cached on disk.

A kernel that holds a ctypes pointer cannot be cached (the address is baked in), and FFCV therefore compiles its
pipelines anew in every process. Registered by name with LLVM instead, the address is looked up at load time.
"""
import ctypes

import ffcv._libffcv
import llvmlite.binding as llvm
from numba import types

_library = ctypes.CDLL(ffcv._libffcv.__file__)
for _name in ("imdecode", "resize"):
    llvm.add_symbol(f"rsb_ffcv_{_name}", ctypes.cast(getattr(_library, _name), ctypes.c_void_p).value)

_pointer, _u32, _i64 = types.voidptr, types.uint32, types.int64

# int imdecode(input, input_size, source_height, source_width, output, crop_height, crop_width, offset_x, offset_y,
#              scale_num, scale_denom, enable_crop, hflip): 0, or -1 where libjpeg-turbo reports an error or a warning
imdecode = types.ExternalFunction("rsb_ffcv_imdecode", types.int32(
    _pointer, types.uint64, _u32, _u32, _pointer, _u32, _u32, _u32, _u32, _u32, _u32, types.int32, types.int32))

# void resize(0, source, height, width, start_row, end_row, start_col, end_col, destination, out_height, out_width):
#              OpenCV INTER_AREA of the crop
resize = types.ExternalFunction("rsb_ffcv_resize", types.void(*[_i64] * 11))
