"""timm's own train.py, unchanged, with this project's loader.

    git clone https://github.com/huggingface/pytorch-image-models
    python examples/timm_train.py pytorch-image-models/train.py --data-dir imagenet \\
        --val-split val --model resnet50 --amp --channels-last --aa rand-m7-mstd0.5-inc1 ...

--data-dir is a folder with <split>.beton for each of --train-split (train) and --val-split. All
other arguments are those of train.py. On one GPU, several (torchrun) or a CPU.

train.py takes its data from two functions, timm.data.create_dataset and create_loader. This
program replaces them and runs train.py. Crops, flips, RandAugment and colour jitter are this
project's: their random numbers are a function of --seed, the epoch and the position in it.
Normalization, erasing and mixing are done on the device: the last two by timm, in this order, also
with timm's prefetcher, which mixes first. --mixup-off-epoch works with and without
--no-prefetcher. An argument that this loader cannot follow is an error.
"""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsb_ffcv import EvalLoader, InputError, TrainLoader, normalize

# Arguments of timm's functions that change nothing here: there are no worker processes to
# configure. The schedule of batch sizes (batch_*) is used with input_size_choices only, which is an
# error
WITHOUT_EFFECT = {"batch_size", "pin_memory", "worker_seeding", "use_multi_epochs_loader"}


def check_unused(options: dict[str, Any]) -> None:
    """Raises InputError for an option that train.py has set and this loader does not have."""
    for name, value in options.items():
        if value and name not in WITHOUT_EFFECT and not name.startswith("batch_"):
            raise InputError(f"{name}={value!r}: this loader cannot do it; leave it at its default")


class Dataset:
    """What train.py takes for the dataset: the file, and the epoch, which train.py sets."""

    def __init__(self, name: str, root: str, split: str, seed: int = 0, **options: Any) -> None:
        if options.pop("input_img_mode", "RGB") != "RGB":
            raise InputError(
                "input_img_mode: this loader makes RGB images; leave it at its default"
            )
        check_unused({"dataset": name, **options, "is_training": False})
        self.path, self.seed, self.epoch = Path(root) / f"{split}.beton", seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Loader:
    """What train.py takes for timm's loader: yields (normalized images, targets) on the device."""

    sampler = batch_sampler = None  # train.py would set their epoch; the dataset has it

    def __init__(
        self,
        dataset: Dataset,
        input_size: tuple[int, int, int],
        batch_size: int,
        is_training: bool = False,
        *,
        scale: Any = (0.08, 1.0),
        ratio: Any = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: float | tuple[float, ...] | None = 0.4,
        auto_augment: str | None = None,
        num_aug_repeats: float = 0,
        interpolation: str = "bilinear",
        train_crop_mode: str | None = None,
        re_prob: float = 0.0,
        re_mode: str = "const",
        re_count: int = 1,
        crop_pct: float | None = None,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        num_workers: int = 1,
        distributed: bool = False,
        collate_fn: Any = None,
        img_dtype: torch.dtype = torch.float32,
        device: torch.device,
        use_prefetcher: bool = True,
        **options: Any,
    ) -> None:
        """The parameters are those of timm.data.create_loader."""
        check_unused(options)
        channels, height, side = input_size
        if channels != 3 or height != side or train_crop_mode not in (None, "rrc"):
            raise InputError(
                f"input_size={input_size}, train_crop_mode={train_crop_mode}: this loader makes "
                f"square RGB images by random resized crops; use --input-size 3 <side> <side>"
            )
        self.dataset, self.is_training, self.mix = dataset, is_training, collate_fn
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), img_dtype
        rank, world = 0, 1
        if distributed:
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        common: dict[str, Any] = {
            "batch_size": batch_size,
            "resolution": side,
            "num_workers": max(1, num_workers),
            "interpolation": interpolation,
            "rank": rank,
            "world_size": world,
            "device": device,
            "decode": "gpu" if device.type == "cuda" else "cpu",
        }
        self.erase = None
        if not is_training:
            loader = EvalLoader(dataset.path, crop_ratio=crop_pct or 0.875, **common)
            # Every process must take the same number of steps: as timm's sampler, repeat the first
            count = len(loader.beton)
            loader.indices = np.arange(rank, -(-count // world) * world, world) % count
            self.loader: TrainLoader | EvalLoader = loader
            return
        if auto_augment and not auto_augment.startswith("3a"):
            color_jitter = None  # as timm
        jitter = color_jitter if isinstance(color_jitter, tuple) else (color_jitter or 0.0,) * 3
        self.loader = TrainLoader(
            dataset.path,
            seed=dataset.seed,
            scale=tuple(scale),
            ratio=tuple(ratio),
            flip_prob=hflip,
            rand_augment=auto_augment or "",
            color_jitter=(*jitter, 0.0)[:4],
            repeats=int(num_aug_repeats) or 1,
            **common,
        )
        if re_prob:
            from timm.data.random_erasing import RandomErasing

            self.erase = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device=device)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        from timm.data import Mixup

        if isinstance(self.loader, TrainLoader):
            batches = self.loader.epoch(self.dataset.epoch)
        else:
            batches = iter(self.loader)
        for images, targets, _ in batches:
            pixels = normalize(images, self.mean, self.std).to(self.dtype)
            if self.erase is not None:
                pixels = self.erase(pixels)
            if self.mix is not None:  # timm's FastCollateMixup: its parent mixes on the device
                pixels, targets = Mixup.__call__(self.mix, pixels, targets)
            yield pixels, targets

    @property
    def mixup_enabled(self) -> bool:
        return self.mix is not None and self.mix.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, on: bool) -> None:
        if self.mix is not None:
            self.mix.mixup_enabled = on


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        raise SystemExit("error: the first argument must be the path of timm's train.py")
    script = sys.argv.pop(1)
    # As if it were run alone: a checkout's own timm comes before the installed one
    sys.path.insert(0, str(Path(script).resolve().parent))
    import timm.data

    vars(timm.data).update(create_dataset=Dataset, create_loader=Loader)
    try:
        runpy.run_path(script, run_name="__main__")
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
