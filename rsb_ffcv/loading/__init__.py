"""Epoch order, the loader, and the transforms of a whole batch on the device."""

from rsb_ffcv.loading.loader import EvalLoader, TrainLoader

__all__ = ["EvalLoader", "TrainLoader"]
