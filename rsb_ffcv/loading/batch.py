"""The transforms of a batch on the device: normalize, random erasing, then mixup or cutmix.

Erasing comes before mixing, as in torchvision and in timm without its prefetcher. timm's
prefetching loader mixes first.

In: uint8 (n, H, W, 3) images of one mix group. Out: float32 (n, 3, H, W) images in channels_last
layout, and lam, the weight of each image in its mix, from which the loss computes the targets. The
random numbers are drawn on the host from the group's address, so no step synchronizes with the
device.

Sources matched, timm 1.0.31: `timm/data/mixup.py` (one lambda per group, pair or image; the
partners are the flipped group; the box is clipped and lambda corrected) and
`timm/data/random_erasing.py` (one box per image).
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numba import njit

from rsb_ffcv import check_choice
from rsb_ffcv.ops import draws as d

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for RGB in 0 .. 1


def normalize(
    images: torch.Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> torch.Tensor:
    """uint8 (n, H, W, 3) -> float32 (n, 3, H, W), channels_last: (x / 255 - mean) / std."""
    scale, shift = scale_and_shift(mean, std, images.device)
    # from uint8 in one pass: a float copy would be written and read again
    return torch.mul(images, scale).add_(shift).permute(0, 3, 1, 2)


@cache
def scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two constants of `normalize` for uint8 values, float32 (3,). Cached on the device: a copy
    in each step would synchronize with it."""
    return (
        torch.tensor([1 / (255 * s) for s in std], device=device),
        torch.tensor([-m / s for m, s in zip(mean, std)], device=device),
    )


@dataclass(frozen=True)
class Mix:
    """One draw of the mix.

    lam: weight of an image's own label, 0 .. 1.
    box: (top, bottom, left, right) in pixels that cutmix copies from the partner; None for mixup.
    """

    lam: float = 1.0
    box: tuple[int, int, int, int] | None = None


def draw_mix(
    seed: int,
    epoch: int,
    slot: int,
    *,
    height: int,
    width: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float = 1.0,
    switch_prob: float = 0.5,
) -> Mix:
    """timm's draw at one address.

    seed, epoch, slot: the address.
    height, width: of the images, in pixels.
    mixup_alpha, cutmix_alpha: of Beta(alpha, alpha); 0 disables that kind.
    prob: probability of mixing at all, 0 .. 1.
    switch_prob: probability of cutmix if both kinds are enabled, 0 .. 1.
    """

    def uniform(k: int) -> float:
        return d.uniform(seed, epoch, slot, d.MIX, k)

    if not (mixup_alpha or cutmix_alpha) or uniform(0) >= prob:
        return Mix()
    cutmix = cutmix_alpha > 0 and (mixup_alpha == 0 or uniform(1) < switch_prob)
    lam, _ = d.beta(seed, epoch, slot, d.MIX, 8, float(cutmix_alpha if cutmix else mixup_alpha))
    if not cutmix:
        return Mix(lam)
    return cutmix_box(
        lam, height, width, centre_y=int(uniform(2) * height), centre_x=int(uniform(3) * width)
    )


def cutmix_box(lam: float, height: int, width: int, *, centre_y: int, centre_x: int) -> Mix:
    """A box of sides int(height x sqrt(1 - lam)), int(width x sqrt(1 - lam)) around a centre,
    clipped to the image. lam is computed again from the clipped area. Odd sides stay odd, as in
    timm 1.0.31; earlier versions of timm shortened them by one pixel."""
    ratio = math.sqrt(1 - lam)
    cut_height, cut_width = int(height * ratio), int(width * ratio)
    top, bottom = (
        min(max(y, 0), height)
        for y in (centre_y - cut_height // 2, centre_y + (cut_height + 1) // 2)
    )
    left, right = (
        min(max(x, 0), width) for x in (centre_x - cut_width // 2, centre_x + (cut_width + 1) // 2)
    )
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_images(images: torch.Tensor, mix: Mix) -> torch.Tensor:
    """images: float (n, C, H, W). Image i is mixed with image n - 1 - i. Changes `images` in place
    and returns it."""
    if mix.box is not None:
        top, bottom, left, right = mix.box
        images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
    elif mix.lam != 1.0:
        partners = images.flip(0).mul_(1 - mix.lam)
        images.mul_(mix.lam).add_(partners)
    return images


def mix_each(images: torch.Tensor, mixes: list[Mix]) -> tuple[torch.Tensor, torch.Tensor]:
    """As `mix_images`, with one Mix per image, or one per image of the first half, which its
    partner shares. Returns new images, and the lam of each image, float32 (n, 1)."""
    if len(mixes) < len(images):
        mixes = mixes + mixes[::-1]
    lam = _to(torch.tensor([mix.lam for mix in mixes], dtype=torch.float32), images)
    boxes = torch.tensor([mix.box or (0, 0, 0, 0) for mix in mixes])
    pasted = _to(torch.tensor([mix.box is not None for mix in mixes]), images)
    blend = torch.where(pasted, 1.0, lam)[:, None, None, None]
    partners = images.flip(0)
    mixed = torch.where(blend == 1, images, images * blend + partners * (1 - blend))
    return torch.where(inside_boxes(boxes, images), partners, mixed), lam[:, None]


@njit(cache=True, nogil=True)
def erase_boxes(
    seed: int,
    epoch: int,
    slots: np.ndarray,
    height: int,
    width: int,
    prob: float,
    min_area: float,
    max_area: float,
    min_aspect: float,
    max_aspect: float,
) -> np.ndarray:
    """Returns int64 (n, 4): the box to erase in each image, (top, bottom, left, right) in pixels;
    zeros for no box. If 10 tries do not fit, nothing is erased.

    seed, epoch: of the address.
    slots: int64 (n,), of the images.
    height, width: of the images, in pixels.
    prob: probability of erasing, per image.
    min_area, max_area: the area is uniform between these shares of the image's area.
    min_aspect, max_aspect: the aspect (height / width) is log-uniform between these.
    """
    boxes = np.zeros((len(slots), 4), np.int64)
    log_lo, log_hi = math.log(min_aspect), math.log(max_aspect)
    for i in range(len(slots)):
        if d.uniform(seed, epoch, slots[i], d.ERASE, 0) >= prob:
            continue
        for attempt in range(10):
            k = 4 + 4 * attempt
            area = (
                height
                * width
                * (min_area + (max_area - min_area) * d.uniform(seed, epoch, slots[i], d.ERASE, k))
            )
            aspect = math.exp(
                log_lo + (log_hi - log_lo) * d.uniform(seed, epoch, slots[i], d.ERASE, k + 1)
            )
            h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
            if h < height and w < width:
                top = d.below(seed, epoch, slots[i], d.ERASE, k + 2, height - h + 1)
                left = d.below(seed, epoch, slots[i], d.ERASE, k + 3, width - w + 1)
                boxes[i] = (top, top + h, left, left + w)
                break
    return boxes


def inside_boxes(boxes: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Returns a mask, bool (n, 1, H, W), on the images' device. boxes: int64 (n, 4) on the CPU:
    top, bottom, left, right."""
    box = _to(boxes, images)[:, :, None]
    y, x = (torch.arange(side, device=images.device)[None] for side in images.shape[2:])
    rows, columns = (y >= box[:, 0]) & (y < box[:, 1]), (x >= box[:, 2]) & (x < box[:, 3])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _to(numbers: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Copies a small host tensor to the images' device without synchronizing."""
    return (numbers.pin_memory() if images.is_cuda else numbers).to(
        images.device, non_blocking=True
    )


def erase(images: torch.Tensor, boxes: np.ndarray, mode: str, *, noise_seed: int) -> torch.Tensor:
    """Fills one box per image, in place.

    images: normalized, (n, C, H, W).
    boxes: see `erase_boxes`.
    mode: "const" (0), "rand" (one normally distributed colour per image) or "pixel" (normal noise).
    noise_seed: seed of the generator of "rand" and "pixel".
    """
    n, channels, height, width = images.shape
    inside = inside_boxes(torch.from_numpy(boxes), images)
    if mode == "const":
        return images.masked_fill_(inside, 0)
    shape = (n, height, width, channels) if mode == "pixel" else (n, 1, 1, channels)
    generator = torch.Generator(images.device).manual_seed(noise_seed)
    noise = torch.randn(shape, generator=generator, device=images.device).permute(0, 3, 1, 2)
    return images.copy_(torch.where(inside, noise, images))


# The unit of the weights in Drawn.counts: integers have the same sum in any order.
WEIGHT_UNIT = 2.0**-32


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawn:
    """The random numbers of a batch of images.

    images: number of images.
    pixels: pixels of an image.
    boxes: int64 (images, 4), what is erased (see `erase_boxes`); None: nothing.
    noise_seed: see `erase`.
    mixes: empty if nothing is mixed; one of the batch, one per image of its first half, which its
        partner shares, or one per image.
    """

    images: int
    pixels: int
    boxes: np.ndarray | None
    noise_seed: int
    mixes: list[Mix]

    def counts(self) -> Counter[str]:
        """How strongly the batch is changed, as integers that are added over batches: `groups` (1),
        `images`, `pixels`; `mixed`, the images whose own label has a weight below 1; `weight`, the
        sum of these weights over the images, in WEIGHT_UNIT; `erased` pixels."""
        shares = [mix.lam for mix in self.mixes] or [1.0]
        each = self.images // len(shares)
        erased = 0
        if self.boxes is not None:
            top, bottom, left, right = self.boxes.T
            erased = int(((bottom - top) * (right - left)).sum())
        return Counter(
            groups=1,
            images=self.images,
            pixels=self.images * self.pixels,
            mixed=each * sum(lam < 1 for lam in shares),
            weight=each * sum(round(lam / WEIGHT_UNIT) for lam in shares),
            erased=erased,
        )


@dataclass(frozen=True, kw_only=True)
class BatchTransform:
    """All transforms between the loader's uint8 images and the model, with a recipe's settings.

    seed: of the draws.
    mixup_alpha, cutmix_alpha: of Beta(alpha, alpha); 0 disables that kind.
    mix_prob: probability of mixing at all, 0 .. 1.
    switch_prob: probability of cutmix if both kinds are enabled, 0 .. 1.
    erase_prob: probability of erasing, per image, 0 .. 1.
    erase_mode: fill with 0 ("const"), one random colour ("rand") or random pixels ("pixel").
    erase_area: smallest and largest area, as shares of the image's area.
    erase_aspect: smallest and largest height / width.
    mode: what shares one draw of the mix: "batch" (the group), "pair" (an image and its partner) or
        "elem" (each image has its own).

    Raises InputError for an unknown erase_mode or mode.
    """

    seed: int
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    erase_prob: float = 0.0
    erase_mode: str = "const"
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3)
    mode: str = "batch"

    def __post_init__(self) -> None:
        check_choice("erase_mode", self.erase_mode, ("const", "rand", "pixel"))
        check_choice("mode", self.mode, ("batch", "pair", "elem"))

    @property
    def mixes(self) -> bool:
        return bool(self.mixup_alpha or self.cutmix_alpha)

    def __call__(
        self, images: torch.Tensor, epoch: int, slots: np.ndarray, *, mixing: bool = True
    ) -> tuple[torch.Tensor, float | torch.Tensor | None]:
        """Draws the random numbers and applies them; see `draw` and `apply`."""
        sides = images.shape[1], images.shape[2]
        return self.apply(images, self.draw(epoch, slots, sides, mixing=mixing))

    def draw(
        self, epoch: int, slots: np.ndarray, sides: tuple[int, int], *, mixing: bool = True
    ) -> Drawn:
        """The random numbers of the mix group at `slots`.

        epoch, slots: of the addresses.
        sides: height and width of the images, in pixels.
        mixing: whether to mix at all.
        """
        height, width = sides
        boxes = None
        if self.erase_prob:
            boxes = erase_boxes(
                self.seed,
                epoch,
                slots,
                height,
                width,
                self.erase_prob,
                *self.erase_area,
                *self.erase_aspect,
            )
        count = {"batch": 1, "pair": len(slots) // 2, "elem": len(slots)}[self.mode]
        return Drawn(
            images=len(slots),
            pixels=height * width,
            boxes=boxes,
            noise_seed=d.torch_seed(self.seed, epoch, int(slots[0]), d.NOISE),
            mixes=[
                draw_mix(
                    self.seed,
                    epoch,
                    int(slot),
                    height=height,
                    width=width,
                    mixup_alpha=self.mixup_alpha,
                    cutmix_alpha=self.cutmix_alpha,
                    prob=self.mix_prob,
                    switch_prob=self.switch_prob,
                )
                for slot in slots[: count if mixing and self.mixes else 0]
            ],
        )

    def apply(
        self, images: torch.Tensor, drawn: Drawn
    ) -> tuple[torch.Tensor, float | torch.Tensor | None]:
        """Returns (float32 images (n, 3, H, W), lam).

        images: uint8 (n, H, W, 3), those that `drawn` is for.
        lam: weight of image i in its mix, one number or a tensor (n, 1); image n - 1 - i has the
            rest. None if nothing is mixed.
        """
        images = normalize(images)
        if drawn.boxes is not None:
            erase(images, drawn.boxes, self.erase_mode, noise_seed=drawn.noise_seed)
        if not drawn.mixes:
            return images, None
        if self.mode == "batch":
            (mix,) = drawn.mixes
            return mix_images(images, mix), mix.lam
        return mix_each(images, drawn.mixes)
