"""Epoch order, the loaders, and the transforms of a batch on the device."""

from rsb_ffcv.loading.loader import Batch, EvalLoader, TrainLoader

__all__ = ["Batch", "EvalLoader", "TrainLoader"]
