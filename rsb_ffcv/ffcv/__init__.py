"""The door for code written for FFCV, in both directions.

`Loader` takes the arguments and pipelines of FFCV's Loader and runs them on this core. The other
names are operations of this core for the pipelines of either loader. Only this part imports ffcv,
which takes seconds.
"""

from rsb_ffcv import InputError

try:
    import ffcv
except ImportError as error:
    raise InputError(
        f"rsb_ffcv.ffcv needs the package ffcv ({error}); install it: pip install 'rsb_ffcv[ffcv]'"
    ) from error
from ffcv.loader import OrderOption

from rsb_ffcv.ffcv.loader import Loader
from rsb_ffcv.ffcv.operations import (
    CenterCropDecoder,
    ColorJitter,
    RandAugment,
    RandomErasing,
    RandomResizedCropDecoder,
)

__all__ = [
    "CenterCropDecoder",
    "ColorJitter",
    "Loader",
    "OrderOption",
    "RandAugment",
    "RandomErasing",
    "RandomResizedCropDecoder",
]
del ffcv
