"""The loaders that benchmarks/loader.py compares. Each decodes all images once per repeat, at 224
px, in uint8 batches of 128.

Imports are inside the classes, so that a process imports only what it measures. The other loaders
are configured as in their documentation, with as many worker processes or threads as ours. Where
the work differs from ours, the docstring says so.
"""

import ctypes
import math
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

BATCH, SIDE, CROP_RATIO = 128, 224, 0.95
# of ImageNet, 0 .. 255
MEAN = [255 * mean for mean in (0.485, 0.456, 0.406)]
STD = [255 * std for std in (0.229, 0.224, 0.225)]


class Loader:
    """A loader of uint8 images. Its first repeat, the warm-up, looks at the pixels instead of only
    counting the images, and sets `facts`: {"mean_pixel": mean red, green and blue, 0 .. 255}."""

    facts: dict | None = None

    def batches(self) -> Iterator:
        """The image batches of one epoch, channels first or last."""
        raise NotImplementedError

    def repeat(self) -> int:
        """Loads one epoch and returns the number of its images."""
        if self.facts is None:
            return self._check()
        return sum(len(batch) for batch in self.batches())

    def _check(self) -> int:
        import numpy as np

        means = []
        for batch in self.batches():
            pixels = np.asarray(batch.as_array() if hasattr(batch, "as_array") else batch)
            if pixels.dtype == np.float16:  # normalized, channels first
                pixels = pixels.astype(np.float32).transpose(0, 2, 3, 1) * STD + MEAN
            elif pixels.dtype != np.uint8 or sorted(pixels.shape[1:]) != [3, SIDE, SIDE]:
                raise ValueError(f"a batch of {pixels.dtype} {pixels.shape}")
            means.append(pixels.mean((2, 3) if pixels.shape[1] == 3 else (1, 2)))
        each = np.concatenate(means)
        self.facts = {"mean_pixel": each.mean(0).round(2).tolist()}
        return len(each)


class Ours(Loader):
    def __init__(
        self, path: str, threads: int, rand_augment: str = "", evaluate: bool = False, **options
    ):
        from rsb_ffcv.loading import EvalLoader, TrainLoader

        self.epoch = 0
        common: dict[str, Any] = {"batch_size": BATCH, "resolution": SIDE, "num_workers": threads}
        self.loader = (
            EvalLoader(path, crop_ratio=CROP_RATIO, interpolation="bicubic", **common)
            if evaluate
            else TrainLoader(path, rand_augment=rand_augment, **common, **options)
        )

    def batches(self) -> Iterator:
        self.epoch += 1
        batches = self.loader if hasattr(self.loader, "__iter__") else self.loader.epoch(self.epoch)
        return (batch.images for batch in batches)


class StockFFCV(Loader):
    """Decodes the whole image, crops, and resizes with OpenCV's area filter. ToTensor makes no
    copy.

    normalized: whether NormalizeImage follows, to float16 as in ffcv-imagenet, on arrays because
        that needs no GPU.
    """

    def __init__(self, path: str, threads: int, evaluate: bool = False, normalized: bool = False):
        import numpy as np
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import (
            CenterCropRGBImageDecoder,
            RandomResizedCropRGBImageDecoder,
        )
        from ffcv.loader import OrderOption
        from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

        image = (
            [CenterCropRGBImageDecoder((SIDE, SIDE), CROP_RATIO)]
            if evaluate
            else [RandomResizedCropRGBImageDecoder((SIDE, SIDE)), RandomHorizontalFlip()]
        )
        if normalized:
            image.append(NormalizeImage(np.array(MEAN), np.array(STD), np.float16))
        image.append(ToTensor())
        if normalized:
            image.append(ToTorchImage())
        self.loader = self.kind()(
            path,
            batch_size=BATCH,
            num_workers=threads,
            os_cache=True,
            drop_last=False,
            order=OrderOption.SEQUENTIAL if evaluate else OrderOption.RANDOM,
            pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
        )

    def kind(self) -> Callable:
        from ffcv.loader import Loader

        return Loader

    def batches(self) -> Iterator:
        return (images for images, _ in self.loader)


class Door(StockFFCV):
    """FFCV's pipeline in the Loader of rsb_ffcv.ffcv."""

    def kind(self) -> Callable:
        from rsb_ffcv.ffcv import Loader

        return Loader


class Dali(Loader):
    """DALI's fused decoder of a random region, as in NVIDIA's ImageNet example, on the CPU."""

    def __init__(self, folder: str, threads: int, rand_augment: bool = False):
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.auto_aug import rand_augment as dali_augment

        files = sorted(map(str, Path(folder).glob("*/*.jpg")))
        self.count = len(files) // BATCH

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

    def batches(self) -> Iterator:
        return (self.pipeline.run()[0] for _ in range(self.count))


class Timm(Loader):
    """timm's dataset, transform and collation up to the uint8 batch. The work of its prefetcher is
    not included, because the GPU does it. Pillow decodes the whole image."""

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

    def batches(self) -> Iterator:
        return (images for images, _ in self.loader)


def torchvision_transform(rand_augment: bool = False, evaluate: bool = False) -> Callable:
    """The transforms v2 of torchvision's classification references, up to the uint8 tensor:
    bilinear in training, bicubic in evaluation (as ours), antialiased. RandAugment has the
    references' settings; its magnitude (9 of 31 bins) does not change the work."""
    from torchvision.transforms import InterpolationMode, v2

    if evaluate:
        size = math.floor(SIDE / CROP_RATIO)
        resize = v2.Resize(size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return v2.Compose([resize, v2.CenterCrop(SIDE)])
    steps = [v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()]
    if rand_augment:
        steps.append(v2.RandAugment(interpolation=InterpolationMode.BILINEAR))
    return v2.Compose(steps)


class TorchVision(Loader):
    """torchvision's references with the tensor backend: its decoder (libjpeg-turbo, the whole
    image) and transforms v2 on uint8 tensors in the workers of a DataLoader."""

    def __init__(
        self, folder: str, threads: int, rand_augment: bool = False, evaluate: bool = False
    ):
        import torch
        from torchvision.datasets import ImageFolder
        from torchvision.io import ImageReadMode, decode_image

        self.loader = torch.utils.data.DataLoader(
            ImageFolder(
                folder,
                transform=torchvision_transform(rand_augment, evaluate),
                loader=partial(decode_image, mode=ImageReadMode.RGB),
            ),
            batch_size=BATCH,
            shuffle=not evaluate,
            num_workers=threads,
            drop_last=not evaluate,
            persistent_workers=True,
        )

    def batches(self) -> Iterator:
        return (images for images, _ in self.loader)


class WebDataset(Loader):
    """WebDataset's documented pipeline: .tar shards, a buffer of 1000 shuffled samples, batches
    made in the workers. torchvision decodes the whole image (faster than WebDataset's own
    decoder, Pillow) and transforms it. The shuffled order is not a permutation of all images, and
    the last batch of each worker may be smaller."""

    @staticmethod
    def write(files: list[tuple[str, int]], folder: Path, threads: int):
        """Writes the (path, label) `files` as at least four shards a worker."""
        import webdataset

        folder.mkdir()
        most = math.ceil(len(files) / (4 * threads))
        with webdataset.ShardWriter(f"{folder}/%04d.tar", maxcount=most, verbose=0) as writer:
            for path, label in files:
                data = Path(path).read_bytes()
                writer.write({"__key__": Path(path).stem, "jpg": data, "cls": label})

    def __init__(self, shards: str, threads: int, rand_augment: bool = False):
        import torch
        import webdataset
        from torchvision.io import ImageReadMode, decode_jpeg

        def decode(data: bytes):
            return decode_jpeg(
                torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
            )

        dataset = (
            webdataset.WebDataset(sorted(map(str, Path(shards).glob("*.tar"))), shardshuffle=100)
            .shuffle(1000)
            .decode(webdataset.handle_extension("jpg", decode))
            .to_tuple("jpg", "cls")
            .map_tuple(torchvision_transform(rand_augment))
            .batched(BATCH, collation_fn=torch.utils.data.default_collate)
        )
        self.loader = webdataset.WebLoader(
            dataset, batch_size=None, num_workers=threads, persistent_workers=True
        )

    def batches(self) -> Iterator:
        return (images for images, _ in self.loader)


def litdata_sample(file: tuple[str, int]):
    """What LitData stores of a (path, label): the bytes of the JPEG file, and the label."""
    from PIL import Image

    return Image.open(file[0]), file[1]


class LitData(Loader):
    """LitData's own ImageNet benchmark: chunks of 64 MB that hold the JPEG files, mapped into
    memory. LitData decodes the whole image with torchvision; transforms v2 on the uint8 tensor.
    The last batch of each worker may be smaller."""

    @staticmethod
    def write(files: list[tuple[str, int]], folder: Path, threads: int):
        """Writes the (path, label) `files` as chunks."""
        os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it asks the package index
        import litdata

        litdata.optimize(
            fn=litdata_sample,
            inputs=files,
            output_dir=str(folder),
            chunk_bytes="64MB",
            num_workers=threads,
            reorder_files=False,
            verbose=False,
        )

    def __init__(self, chunks: str, threads: int, rand_augment: bool = False):
        os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
        import litdata

        transform = torchvision_transform(rand_augment)
        self.loader = litdata.StreamingDataLoader(
            litdata.StreamingDataset(
                chunks,
                shuffle=True,
                transform=lambda sample: (transform(sample[0]), sample[1]),
            ),
            batch_size=BATCH,
            num_workers=threads,
            persistent_workers=True,
        )

    def batches(self) -> Iterator:
        return (images for images, _ in self.loader)


def random_resized_crop(width: int, height: int) -> tuple[int, int, int, int]:
    """torchvision's draw of a box: (width, height, left, top)."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return w, h, random.randint(0, width - w), random.randint(0, height - h)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return w, h, (width - w) // 2, (height - h) // 2


class Spdl(Loader):
    """SPDL's ImageNet example, on the CPU: each thread makes whole batches, which takes less time
    than a stage for each image. FFmpeg decodes the whole image (not with libjpeg-turbo); its
    filters crop, resize and flip, in the order that takes the least time. Boxes are rounded to
    chroma pixels. SPDL has no RandomResizedCrop, so the box is drawn here, and no RandAugment."""

    def __init__(self, folder: str, threads: int, evaluate: bool = False):
        import spdl.io
        from spdl.dataloader import DataLoader

        self.shuffle = not evaluate
        self.files = sorted((str(path), 0) for path in Path(folder).glob("*/*.jpg"))

        def decode(path: str):
            with spdl.io.Demuxer(path) as demuxer:
                codec = demuxer.image_codec
                packets = demuxer.demux_image()
            if evaluate:
                side = round(min(codec.width, codec.height) * SIDE / math.floor(SIDE / CROP_RATIO))
                crop, kernel, flip = f"{side}:{side}", "bicubic", ""  # FFmpeg crops at the centre
            else:
                crop = ":".join(map(str, random_resized_crop(codec.width, codec.height)))
                kernel, flip = "bilinear", random.choice(("", ",hflip"))
            steps = f"crop={crop},scale={SIDE}:{SIDE}:flags={kernel},format=rgb24{flip}"
            return spdl.io.decode_packets(packets, filter_desc=steps)

        def batch(files: list[tuple[str, int]]):
            frames = spdl.io.convert_frames([decode(path) for path, _ in files])
            return spdl.io.to_torch(frames), [label for _, label in files]

        self.loader = DataLoader(
            self.files,
            batch_size=BATCH,
            drop_last=not evaluate,
            aggregator=batch,
            num_threads=threads,
        )

    def batches(self) -> Iterator:
        if self.shuffle:
            random.shuffle(self.files)
        return (images for images, _ in self.loader)


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
