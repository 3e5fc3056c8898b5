"""The loaders that benchmarks/loader.py compares. Each decodes `path` once per repeat, at 224 px,
in uint8 batches of 128.

Imports are inside the classes, so that a process imports only what it measures. The other loaders
are configured as in their documentation.
"""

import ctypes
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BATCH, SIDE = 128, 224
MEAN = (124, 116, 104)


class Ours:
    def __init__(
        self, path: str, threads: int, rand_augment: str = "", evaluate: bool = False, **options
    ):
        from rsb_ffcv.loading import EvalLoader, TrainLoader

        self.epoch = 0
        common: dict[str, Any] = {"batch_size": BATCH, "resolution": SIDE, "num_workers": threads}
        self.loader = (
            EvalLoader(path, crop_ratio=0.95, interpolation="bicubic", **common)
            if evaluate
            else TrainLoader(path, rand_augment=rand_augment, **common, **options)
        )

    def repeat(self) -> int:
        self.epoch += 1
        batches = self.loader if hasattr(self.loader, "__iter__") else self.loader.epoch(self.epoch)
        return sum(len(batch.labels) for batch in batches)


class StockFFCV:
    def __init__(self, path: str, threads: int, evaluate: bool = False):
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import (
            CenterCropRGBImageDecoder,
            RandomResizedCropRGBImageDecoder,
        )
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor

        image = (
            [CenterCropRGBImageDecoder((SIDE, SIDE), 0.95), ToTensor()]
            if evaluate
            else [
                RandomResizedCropRGBImageDecoder((SIDE, SIDE)),
                RandomHorizontalFlip(),
                ToTensor(),
            ]
        )
        self.loader = Loader(
            path,
            batch_size=BATCH,
            num_workers=threads,
            os_cache=True,
            drop_last=False,
            order=OrderOption.SEQUENTIAL if evaluate else OrderOption.RANDOM,
            pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
        )

    def repeat(self) -> int:
        return sum(len(labels) for _, labels in self.loader)


class Dali:
    """DALI's fused decoder of a random region, as in NVIDIA's ImageNet example, on the CPU."""

    def __init__(self, folder: str, threads: int, rand_augment: bool = False):
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.auto_aug import rand_augment as dali_augment

        files = sorted(map(str, Path(folder).glob("*/*.jpg")))
        self.batches = len(files) // BATCH

        @pipeline_def(
            batch_size=BATCH, num_threads=threads, device_id=None, enable_conditionals=True
        )
        def pipeline():
            encoded, labels = fn.readers.file(
                files=files, labels=[0] * len(files), random_shuffle=True
            )
            images = fn.decoders.image_random_crop(
                encoded,
                device="cpu",
                output_type=types.RGB,
                random_area=[0.08, 1.0],
                random_aspect_ratio=[3 / 4, 4 / 3],
                num_attempts=10,
            )
            images = fn.resize(
                images, resize_x=SIDE, resize_y=SIDE, interp_type=types.INTERP_LINEAR
            )
            images = fn.flip(images, horizontal=fn.random.coin_flip())
            if rand_augment:
                images = dali_augment.rand_augment(images, n=2, m=7, fill_value=128)
            return images, labels

        self.pipeline = pipeline()
        self.pipeline.build()

    def repeat(self) -> int:
        return sum(len(self.pipeline.run()[1]) for _ in range(self.batches))


class Timm:
    """timm's dataset, transform and collation up to the uint8 batch. The work of its prefetcher is
    not included, because the GPU does it."""

    def __init__(self, folder: str, threads: int, rand_augment: str = ""):
        import torch
        from timm.data import ImageDataset, create_transform
        from timm.data.loader import fast_collate

        dataset = ImageDataset(folder)
        dataset.transform = create_transform(
            SIDE,
            is_training=True,
            use_prefetcher=True,
            auto_augment=rand_augment or None,
            color_jitter=0.0,
            interpolation="random",
        )
        self.loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=BATCH,
            shuffle=True,
            num_workers=threads,
            drop_last=True,
            persistent_workers=True,
            collate_fn=fast_collate,
        )

    def repeat(self) -> int:
        return sum(len(labels) for _, labels in self.loader)


class RegionDecode:
    """libjpeg-turbo alone: decodes the rows and columns of the crops of Ours and discards them."""

    def __init__(self, path: str, threads: int):
        import numpy as np

        from rsb_ffcv.beton import read_beton
        from rsb_ffcv.ops.crop import RandomResizedCrop
        from rsb_ffcv.ops.operation import Address

        library = Path(tempfile.mkdtemp()) / "region.so"
        source = Path(__file__).with_name("region.c")
        built = subprocess.run(
            ["cc", "-O3", "-shared", "-fPIC", source, "-o", library, "-ljpeg"],
            capture_output=True,
            text=True,
        )
        if built.returncode:
            raise ImportError(f"libjpeg-turbo's headers: {built.stderr.splitlines()[0]}")
        self.decode = ctypes.CDLL(library).decode_regions
        file = read_beton(path)
        self.data = np.fromfile(path, np.uint8)
        order = np.random.default_rng(0).permutation(len(file))
        boxes = RandomResizedCrop(SIDE).draw(
            Address(0, 1, order), file.heights[order], file.widths[order]
        )["box"]
        self.work = [
            np.ascontiguousarray(part)
            for part in (
                file.pointers[order].astype(np.int64),
                file.sizes[order].astype(np.int64),
                boxes.astype(np.int64),
            )
        ]
        self.pool, self.threads = ThreadPoolExecutor(threads), threads

    def repeat(self) -> int:
        count = len(self.work[0])
        pieces = range(0, count, 32)
        failed = list(
            self.pool.map(
                lambda first: self.decode(
                    self.data.ctypes.data_as(ctypes.c_void_p),
                    *(part.ctypes.data_as(ctypes.c_void_p) for part in self.work),
                    first,
                    min(first + 32, count),
                ),
                pieces,
            )
        )
        assert not any(failed)
        return count
