"""Epoch order, the loader, and the transforms of a whole batch on the device."""

from rsb_ffcv.loading.loader import Batch, EvalLoader, TrainLoader

__all__ = ["Batch", "EvalLoader", "TrainLoader"]
