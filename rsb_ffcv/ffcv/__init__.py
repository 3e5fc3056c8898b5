"""The door for code written for FFCV."""

from ffcv.loader import OrderOption

from rsb_ffcv.ffcv.loader import Loader

__all__ = ["Loader", "OrderOption"]
