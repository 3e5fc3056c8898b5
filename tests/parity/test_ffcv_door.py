"""rsb_ffcv.ffcv beside stock FFCV: the same files, pipelines and seeds give the same batches, and
operations of this core give the same batches in both loaders."""

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

# Importing ffcv sets the threads of torch and numba to one, for all tests of this process.
_threads = torch.get_num_threads(), numba.get_num_threads()
from ffcv.fields import basics, decoders, ndarray  # noqa: E402
from ffcv.loader import Loader as StockLoader  # noqa: E402
from ffcv.pipeline import Compiler, PipelineSpec  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.transforms import (  # noqa: E402
    Convert,
    Cutout,
    ImageMixup,
    LabelMixup,
    MixupToOneHot,
    NormalizeImage,
    Poison,
    RandomBrightness,
    RandomContrast,
    RandomHorizontalFlip,
    RandomSaturation,
    RandomTranslate,
    ReplaceLabel,
    Squeeze,
    ToDevice,
    ToTensor,
    ToTorchImage,
    View,
)
from ffcv.traversal_order.base import TraversalOrder  # noqa: E402

from rsb_ffcv import InputError, read_beton  # noqa: E402
from rsb_ffcv import ffcv as door  # noqa: E402
from rsb_ffcv.ffcv import pipeline as door_pipeline  # noqa: E402
from rsb_ffcv.ops import draws  # noqa: E402

torch.set_num_threads(_threads[0])
numba.set_num_threads(_threads[1])

# numba's clean-up of compiled functions
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parents[2]
MEAN, STD = np.array([120.0, 110.0, 100.0]), np.array([50.0, 60.0, 70.0])
CPU = torch.device("cpu")
RANDOM, SEQUENTIAL = door.OrderOption.RANDOM, door.OrderOption.SEQUENTIAL
QUASI_RANDOM = door.OrderOption.QUASI_RANDOM
COUNT, SIDE = 60, 24  # images of the file below; pixels

WRITE = """
    import numpy as np, torch
    from PIL import Image
    from ffcv.fields import *
    from ffcv.writer import DatasetWriter

    def image(rng, height, width):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        return np.asarray(coarse.resize((width, height), Image.BICUBIC))

    class Samples:
        def __len__(self):
            return {count}

        def __getitem__(self, index):
            rng = np.random.default_rng(index)
            height, width = rng.integers(40, 90, 2)
            points = rng.normal(size=(2, 3)).astype(np.float32)
            text = np.frombuffer(b"x" * index, np.uint8)
            about = {{"name": f"sample {{index}}"}}
            small, large = image(rng, {side}, {side}), image(rng, height, width)
            return index / 7, small, index % 5, points, text, about, large, torch.arange(4) + index

    fields = dict(share=FloatField(), small=RGBImageField(write_mode="raw"))
    fields |= {{"class": IntField()}}
    fields |= dict(points=NDArrayField(np.dtype("<f4"), (2, 3)), text=BytesField())
    fields |= dict(json=JSONField(), large=RGBImageField(write_mode="jpg"))
    fields |= dict(tensor=TorchTensorField(torch.int64, (4,)))
    DatasetWriter({path!r}, fields, num_workers=1).from_indexed_dataset(Samples())
"""


@pytest.fixture(autouse=True)
def threads():
    """The loaders set the threads of torch and numba."""
    before = torch.get_num_threads(), numba.get_num_threads()
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """Makes the collections of `collected` fast: they look at the objects of this module only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def collected():
    """Compiled functions are freed between tests. numba parses code when it frees them, and Python
    3.11 raises SystemError if a collection does that while other code, of FFCV or of a later test,
    is parsed."""
    gc.disable()
    yield
    gc.collect()
    gc.enable()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A file of stock FFCV's with a field of each type, two of them images."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.beton"
    code = textwrap.dedent(WRITE.format(path=str(path), count=COUNT, side=SIDE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return path


OTHERS = ("share", "small", "class", "points", "text", "json", "large", "tensor")


def only(**pipelines):
    """Pipelines of these outputs only."""
    return dict.fromkeys(OTHERS) | pipelines


def Stock(path, *arguments, pipelines, **settings):
    """FFCV's loader, with copies of the lists, from which it removes the decoders."""
    pipelines = {
        name: list(given) if isinstance(given, list) else given for name, given in pipelines.items()
    }
    return StockLoader(str(path), *arguments, pipelines=pipelines, **settings)


def epochs(loader, count=1):
    """The batches of the next epochs. Stock FFCV overwrites its batches: they are copied."""
    return [
        [
            tuple(
                value.clone() if isinstance(value, torch.Tensor) else value.copy()
                for value in batch
            )
            for batch in loader
        ]
        for _ in range(count)
    ]


def described(batches):
    return [
        [
            (type(value), tuple(value.shape), value.dtype)
            + ((value.stride(),) if isinstance(value, torch.Tensor) else ())
            for value in batch
        ]
        for batch in batches
    ]


def joined(batches, place=0):
    return np.concatenate([np.asarray(batch[place]) for batch in batches])


# ---------------------------------------------------------------- the order


class Backwards(TraversalOrder):
    def sample_order(self, epoch):
        return self.indices[::-1] if epoch % 2 == 0 else self.indices


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(
    "order, seed, indices",
    [
        (SEQUENTIAL, None, None),
        (RANDOM, 7, None),
        (RANDOM, 7, np.arange(50, 3, -3)),
        (SEQUENTIAL, 1, [5, 9, 9, 2, 31, 7, 8, 1, 0]),
    ],
)
def test_order_equals_ffcvs(mixed, order, seed, indices, drop_last):
    settings: dict[str, Any] = {
        "batch_size": 8,
        "num_workers": 2,
        "order": order,
        "seed": seed,
        "indices": indices,
        "drop_last": drop_last,
        "pipelines": only(
            share=[basics.FloatDecoder(), ToTensor()],
            **{"class": [basics.IntDecoder(), ToTensor()]},
        ),
    }
    stock, ours = Stock(mixed, **settings), door.Loader(mixed, **settings)
    assert len(stock) == len(ours)
    for theirs, mine in zip(epochs(stock, 3), epochs(ours, 3)):
        assert described(theirs) == described(mine)
        assert np.array_equal(joined(theirs), joined(mine))
        assert np.array_equal(joined(theirs, 1), joined(mine, 1))


def test_users_own_order_is_used(mixed):
    ours = door.Loader(
        mixed,
        7,
        2,
        order=Backwards,
        drop_last=False,
        pipelines=only(share=[basics.FloatDecoder(), ToTensor()]),
    )
    first, second = epochs(ours, 2)
    assert np.allclose(joined(first)[:, 0] * 7, np.arange(COUNT)[::-1])
    assert np.allclose(joined(second)[:, 0] * 7, np.arange(COUNT))


DISTRIBUTED = """
    import numpy as np, torch, torch.distributed as dist
    from torch.multiprocessing import spawn
    from ffcv.loader import Loader as Stock, OrderOption
    from ffcv.fields.basics import FloatDecoder
    from ffcv.transforms import ToTensor
    from rsb_ffcv.ffcv import Loader

    def load(kind, **settings):
        pipelines = dict.fromkeys({others!r}) | dict(share=[FloatDecoder(), ToTensor()])
        loader = kind({path!r}, 8, 1, distributed=True, drop_last=False, indices=np.arange(59),
                      pipelines=pipelines, **settings)
        return torch.cat([batch[0].clone() for _ in range(2) for batch in loader])

    def work(rank):
        dist.init_process_group("gloo", "file://{folder}/store", rank=rank, world_size=3)
        orders = dict(order=OrderOption.SEQUENTIAL, seed=3), dict(order=OrderOption.RANDOM)
        found = [[load(kind, **order) for kind in (Stock, Loader)] for order in orders]
        quasi = load(Loader, order=OrderOption.QUASI_RANDOM, seed=3, os_cache=False)
        torch.save((found, quasi), f"{folder}/{{rank}}.pt")

    if __name__ == "__main__":
        spawn(work, nprocs=3)
"""


@pytest.mark.long
def test_distributed_order_equals_ffcvs(mixed, tmp_path):
    code = DISTRIBUTED.format(folder=tmp_path, path=str(mixed), others=OTHERS)
    (tmp_path / "run.py").write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for orders, _ in ranks:
        assert all(torch.equal(theirs, mine) for theirs, mine in orders)
    quasi = [(both[:, 0] * 7).round().int() for _, both in ranks]
    for epoch in range(2):
        samples = torch.cat([both.view(2, 20)[epoch] for both in quasi]).tolist()
        assert len(samples) == 60 and sorted(set(samples)) == list(range(59))


# ---------------------------------------------------------------- shapes, types and values


class Doubled(Operation):
    """A user's operation on arrays, with memory, indices and shared memory."""

    def generate_code(self):
        def double(values, out, indices, shared):
            for i in range(len(indices)):
                out[i] = values[i] * 2 + shared[0] + (indices[i] == 3)
            return out

        double.with_indices = True  # type: ignore[attr-defined]
        return double

    def declare_shared_memory(self, previous_state):
        return AllocationQuery((), np.dtype("f8"))

    def generate_code_for_shared_state(self):
        def begin(shared):
            shared[:] = 0.5

        return begin

    def declare_state_and_memory(self, previous_state):
        return previous_state, AllocationQuery(previous_state.shape, previous_state.dtype)


class Half(torch.nn.Module):
    def forward(self, x):
        return x.float() / 2


def simple(*transforms):
    return [decoders.SimpleRGBImageDecoder(), *transforms]


def _exact_pipelines():
    """Pipelines whose result stock FFCV determines to the bit."""
    mask, alpha = np.zeros((SIDE, SIDE, 3)), np.full((SIDE, SIDE), 0.25)
    mask[:5, :5] = 200
    return {
        "raw": only(small=simple(ToTensor())),
        "arrays": only(small=simple(), share=[basics.FloatDecoder()]),
        "always flipped": only(small=simple(RandomHorizontalFlip(1.0), ToTensor())),
        "torch image": only(small=simple(ToTensor(), ToTorchImage())),
        "not channels_last": only(small=simple(ToTensor(), ToTorchImage(channels_last=False))),
        "converted": only(small=simple(ToTensor(), ToTorchImage(), Convert(torch.float16), Half())),
        "moved": only(small=simple(ToTensor(), ToDevice(CPU), ToTorchImage())),
        "normalized": only(
            small=simple(NormalizeImage(MEAN, STD, np.float32), ToTensor(), ToTorchImage())
        ),
        "normalized to half": only(
            small=simple(NormalizeImage(MEAN, STD, np.float16), ToTensor(), ToTorchImage())
        ),
        "viewed as half": only(
            small=simple(NormalizeImage(MEAN, STD, np.float16), View(np.float16), ToTensor())
        ),
        "poisoned": only(small=simple(Poison(mask, alpha, [3, 17]), ToTensor())),
        "mixed": only(
            small=simple(ImageMixup(0.5, True), ToTensor()),
            **{"class": [basics.IntDecoder(), LabelMixup(0.5, True), ToTensor(), MixupToOneHot(5)]},
        ),
        "labels": only(
            **{"class": [basics.IntDecoder(), ReplaceLabel([2, 40], 9), ToTensor(), Squeeze()]}
        ),
        "user's": only(share=[basics.FloatDecoder(), Doubled(), ToTensor()]),
        "arrays and text": only(
            points=[ndarray.NDArrayDecoder(), ToTensor()], tensor=[ndarray.NDArrayDecoder()]
        ),
    }


QUICK = {"raw", "arrays", "normalized", "labels", "user's"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK))
        for name in _exact_pipelines()
    ],
)
def test_pipeline_gives_ffcvs_values(mixed, name):
    settings: dict[str, Any] = {
        "batch_size": 7,
        "num_workers": 1,
        "drop_last": False,
        "order": RANDOM,
        "seed": 5,
    }
    stock = Stock(mixed, **settings, pipelines=_exact_pipelines()[name])
    ours = door.Loader(mixed, **settings, pipelines=_exact_pipelines()[name])
    for theirs, mine in zip(epochs(stock, 2), epochs(ours, 2)):
        assert described(theirs) == described(mine)
        for a, b in zip(theirs, mine):
            assert all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b))


@pytest.mark.long
def test_all_fields_without_pipelines(mixed):
    """FFCV's default pipelines. The rest of a row of bytes is 0; FFCV leaves what was there."""
    pipelines = {"large": [decoders.CenterCropRGBImageDecoder((16, 16), 0.9), ToTensor()]}
    settings: dict[str, Any] = {"batch_size": 60, "num_workers": 2, "pipelines": pipelines}
    ((theirs,),) = epochs(Stock(mixed, **settings))
    ((mine,),) = epochs(door.Loader(mixed, **settings))
    assert described([theirs]) == described([mine])
    for name, a, b in zip(OTHERS, theirs, mine):
        if name == "text":
            assert [bytes_.sum().item() for bytes_ in b] == [ord("x") * i for i in range(COUNT)]
        elif name == "json":
            from ffcv.fields import JSONField

            assert JSONField.unpack(b) == [{"name": f"sample {i}"} for i in range(COUNT)]
        elif name != "large":
            assert torch.equal(a, b), name


@pytest.mark.long
def test_decoded_images_are_close_to_ffcvs(mixed, report):
    """FFCV decodes JPEGs with a faster, less exact DCT and resizes by area. The difference that is
    reported here is the one that docs/ffcv.md states."""
    for size, ratio in (((16, 16), 1.0), ((20, 12), 0.8), ((40, 40), 0.875)):
        pipelines = only(large=[decoders.CenterCropRGBImageDecoder(size, ratio), ToTensor()])
        settings: dict[str, Any] = {"batch_size": 60, "num_workers": 2, "pipelines": pipelines}
        theirs = joined(*epochs(Stock(mixed, **settings))).astype(float)
        mine = joined(*epochs(door.Loader(mixed, **settings))).astype(float)
        difference = np.abs(theirs - mine)
        report(
            f"{size}: mean {difference.mean():.2f}, 99 % below {np.quantile(difference, 0.99):.0f}"
        )
        assert theirs.shape == mine.shape and difference.mean() < 2.5


# ---------------------------------------------------------------- draws of this core


def test_flip_cutout_and_translation_follow_their_draws(mixed):
    """Their effect on each image, from the draws of its address."""
    seed, padding, side = 11, 3, 5
    small = joined(*epochs(door.Loader(mixed, 60, 2, pipelines=only(small=simple(ToTensor())))))
    transforms = (
        RandomHorizontalFlip(0.5),
        Cutout(side, (9, 8, 7)),
        RandomTranslate(padding, (1, 2, 3)),
    )
    loader = door.Loader(
        mixed, 60, 2, order=RANDOM, seed=seed, pipelines=only(small=simple(*transforms, ToTensor()))
    )
    for epoch, batches in enumerate(epochs(loader, 2)):
        order = np.random.default_rng(seed + epoch).permutation(COUNT)
        for slot, (index, image) in enumerate(zip(order, joined(batches))):
            expected = small[index].copy()
            if draws.uniform(seed, epoch, slot, 256, 0) < 0.5:
                expected = expected[:, ::-1].copy()
            top, left = (draws.below(seed, epoch, slot, 257, k, SIDE - side + 1) for k in (0, 1))
            expected[top : top + side, left : left + side] = (9, 8, 7)
            padded = np.empty((SIDE + 2 * padding, SIDE + 2 * padding, 3), np.uint8)
            padded[:] = (1, 2, 3)
            padded[padding:-padding, padding:-padding] = expected
            y, x = (draws.below(seed, epoch, slot, 258, k, 2 * padding + 1) for k in (0, 1))
            assert np.array_equal(image, padded[y : y + SIDE, x : x + SIDE]), (epoch, slot)


@pytest.mark.parametrize("kind", [RandomBrightness, RandomContrast, RandomSaturation])
def test_enhancements_are_close_to_ffcvs_for_the_same_factor(mixed, kind, monkeypatch):
    """FFCV's code, not compiled, with the draws of each address."""
    seed, magnitude = 3, 0.6
    small = joined(*epochs(door.Loader(mixed, 60, 2, pipelines=only(small=simple(ToTensor())))))
    loader = door.Loader(
        mixed, 60, 2, seed=seed, pipelines=only(small=simple(kind(magnitude, p=0.7), ToTensor()))
    )
    mine = joined(*epochs(loader))
    words = np.array(
        [[draws.uniform(seed, 0, slot, 256, k) for k in (0, 1)] for slot in range(COUNT)]
    )
    monkeypatch.setattr(np.random, "rand", lambda count: words[:, 0])
    monkeypatch.setattr(
        np.random, "uniform", lambda low, high, count: low + (high - low) * words[:, 1]
    )
    monkeypatch.setattr(Compiler, "num_threads", 1)
    theirs = kind(magnitude, p=0.7).generate_code()(small.copy())
    difference = np.abs(theirs.astype(int) - mine.astype(int))
    assert difference.max() <= 2 and (mine != small).any((1, 2, 3)).mean() > 0.5
    assert ((mine == small).all((1, 2, 3)) == (words[:, 0] >= 0.7)).mean() > 0.95


def test_normalization_of_tensors_equals_its_table(mixed):
    """FFCV has it on GPUs only."""
    raw = joined(*epochs(door.Loader(mixed, 60, 2, pipelines=only(small=simple(ToTensor())))))
    for kind in (np.float16, np.float32, np.float64):
        transforms = ToTensor(), ToDevice(CPU), ToTorchImage(), NormalizeImage(MEAN, STD, kind)
        ((batch,),) = epochs(door.Loader(mixed, 60, 2, pipelines=only(small=simple(*transforms))))
        (images,) = batch
        expected = ((raw - MEAN) / STD).astype(kind).transpose(0, 3, 1, 2)
        assert images.dtype == torch.from_numpy(expected).dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(images.numpy(), expected)


def random_pipeline(size=(20, 16)):
    return [
        decoders.RandomResizedCropRGBImageDecoder(size),
        RandomHorizontalFlip(),
        ToTensor(),
        ToTorchImage(),
    ]


@pytest.mark.long
def test_random_crops_have_ffcvs_distribution(mixed, tmp_path):
    """Means over many epochs of each image's pixels, which are smooth, agree."""
    settings: dict[str, Any] = {"batch_size": 60, "num_workers": 2}
    means = []
    for kind in (Stock, door.Loader):
        loader = kind(mixed, **settings, pipelines=only(large=random_pipeline()))
        means.append(np.mean([joined(batches) for batches in epochs(loader, 150)], 0))
    difference = means[0] - means[1]
    assert np.abs(difference.mean((1, 2, 3))).mean() < 2 and np.abs(difference).mean() < 6


def test_batches_do_not_depend_on_threads_or_batch_size(mixed):
    found = []
    for batch_size, workers in ((60, 1), (60, 3), (7, 2)):
        loader = door.Loader(
            mixed,
            batch_size,
            workers,
            order=RANDOM,
            seed=2,
            drop_last=False,
            pipelines=only(large=random_pipeline()),
        )
        found.append([joined(batches) for batches in epochs(loader, 2)])
        loader.close()
    for first, second in found[1:]:
        assert np.array_equal(first, found[0][0]) and np.array_equal(second, found[0][1])
    assert not np.array_equal(*found[0])


def test_outputs_of_one_field_have_different_draws(mixed):
    pipelines = only(large=random_pipeline()) | {
        "again": PipelineSpec(
            "large",
            decoders.RandomResizedCropRGBImageDecoder((20, 16)),
            [RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
        )
    }
    ((batch,),) = epochs(door.Loader(mixed, 60, 2, seed=1, pipelines=pipelines))
    assert batch[0].shape == batch[1].shape and not torch.equal(*batch)


def test_outputs_can_continue_from_an_operation(mixed):
    """From one of the core, and from one on tensors."""
    for source_place in (0, 2):
        pipeline = simple(RandomHorizontalFlip(1.0), ToTensor(), ToTorchImage())
        source = pipeline[source_place]
        more = [RandomHorizontalFlip(1.0), ToTensor()] if source_place == 0 else [ToTorchImage()]
        pipelines = only(small=pipeline) | {"other": PipelineSpec(source, transforms=more)}
        ((batch,),) = epochs(door.Loader(mixed, 60, 1, pipelines=pipelines))
        first, other = batch
        other = other.permute(0, 3, 1, 2) if source_place == 0 else other
        assert torch.equal(first, other)


# ---------------------------------------------------------------- epochs and loaders


def test_changed_settings_have_an_effect_in_the_next_epoch(mixed):
    """As ffcv-imagenet changes the resolution."""
    pipeline = random_pipeline((16, 16))
    decoder, flip = pipeline[:2]
    loader = door.Loader(mixed, 60, 2, seed=1, pipelines=only(large=pipeline))
    shapes, flips = [], []
    for size in (16, 24, 16):
        decoder.output_size = (size, size)
        flip.flip_prob = float(size == 24)
        ((images,),) = list(loader)
        shapes.append(tuple(images.shape))
        flips.append(images)
    assert shapes == [(60, 3, size, size) for size in (16, 24, 16)]
    assert len(pipeline) == 4  # FFCV removes the decoder from the caller's list
    loader.next_epoch = 0
    flip.flip_prob = 1.0
    ((mirrored,),) = list(loader)
    assert torch.equal(mirrored, flips[0].flip(3))


def test_epoch_can_begin_at_a_step(mixed):
    loader = door.Loader(
        mixed,
        8,
        2,
        order=RANDOM,
        seed=4,
        drop_last=False,
        pipelines={"large": [decoders.CenterCropRGBImageDecoder((16, 16), 1.0), ToTensor()]},
    )
    whole = list(loader.epoch(5))
    for start in (0, 3, 8):
        rest = list(loader.epoch(5, start_step=start))
        assert len(rest) == len(whole) - start
        for a, b in zip(whole[start:], rest):
            assert all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b))
    assert loader.next_epoch == 0
    with pytest.raises(InputError, match="`start_step`=9: must be 0 to 8; change it"):
        loader.epoch(5, start_step=9)


def test_batches_can_be_kept(mixed):
    loader = door.Loader(mixed, 4, 2, pipelines=only(small=simple(ToTensor())), batches_ahead=1)
    kept = [images for (images,) in loader]
    (alone,) = next(iter(door.Loader(mixed, 60, 1, pipelines=only(small=simple(ToTensor())))))
    assert torch.equal(torch.cat(kept), alone)


def test_filter_keeps_the_samples_of_a_condition(mixed):
    """Within `indices` as well, where FFCV takes positions for indices."""
    indices = np.arange(40, 10, -1)
    loader = door.Loader(
        mixed,
        8,
        2,
        indices=indices,
        drop_last=False,
        pipelines=only(
            **{"class": [basics.IntDecoder(), ToTensor()]},
            share=[basics.FloatDecoder(), ToTensor()],
        ),
    )
    chosen = loader.filter("class", lambda label: label[0] == 3)
    assert chosen.indices.tolist() == [index for index in indices if index % 5 == 3]
    assert np.allclose(joined(*epochs(chosen))[:, 0] * 7, chosen.indices)
    with pytest.raises(
        InputError, match="`field_name`='clas': the file has no such field; use one"
    ):
        loader.filter("clas", bool)


def test_quasi_random_order_has_every_sample_once(mixed):
    for os_cache in (True, False):
        loader = door.Loader(
            mixed,
            8,
            2,
            order=QUASI_RANDOM,
            os_cache=os_cache,
            seed=1,
            drop_last=False,
            pipelines=only(share=[basics.FloatDecoder(), ToTensor()]),
        )
        first, second = (
            np.round(joined(batches)[:, 0] * 7).astype(int) for batches in epochs(loader, 2)
        )
        assert sorted(first) == sorted(second) == list(range(COUNT))
        assert first.tolist() != second.tolist() != list(range(COUNT))


def test_unknown_operations_are_announced_once(mixed, capsys):
    door_pipeline._announced.discard(Doubled)
    for _ in range(2):
        loader = door.Loader(mixed, 8, 2, pipelines=only(share=[basics.FloatDecoder(), Doubled()]))
        list(loader), list(loader)
    error = capsys.readouterr().err
    assert error.count("Doubled runs through FFCV's compiler") == 1 and error.count("\n") == 1


def test_compiled_code_is_kept_unless_recompiled(mixed):
    for again in (False, True):
        loader = door.Loader(
            mixed,
            8,
            2,
            recompile=again,
            pipelines=only(share=[basics.FloatDecoder(), Doubled(), ToTensor()]),
        )
        iter(loader)
        code = loader.code
        iter(loader)
        assert (loader.code == code) != again


# ---------------------------------------------------------------- errors


def test_loader_of_a_forked_process_is_refused(mixed):
    loader = door.Loader(mixed, 8, 2, pipelines=only(small=simple(ToTensor())))
    next(iter(loader))
    child = os.fork()
    if not child:
        try:
            next(iter(loader))
            os._exit(0)
        except RuntimeError as error:
            os._exit(42 if "forked" in str(error) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert len(list(loader)) == 7
    loader.close()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(iter(loader))


def test_damage_is_reported_with_the_sample(betons, mixed, tmp_path):
    """By its checksum in a file of this project, by the decoder in one of FFCV's."""
    pipeline = [decoders.CenterCropRGBImageDecoder((32, 32), 1.0), ToTensor()]
    for path, name, place, why in (
        (betons / "val.beton", "image", read_beton(betons / "val.beton").pointers[5], "checksum"),
        (mixed, "large", None, "not a decodable JPEG"),
    ):
        data = bytearray(path.read_bytes())
        at = data.index(b"\xff\xd8\xff") if place is None else int(place) + 40
        data[at : at + 30] = b"\0" * 30
        broken = tmp_path / path.name
        broken.write_bytes(data)
        loader = door.Loader(broken, 3, 2, pipelines={name: pipeline})
        with pytest.raises(InputError, match=f"sample [0-9]+ is .*{why}"):
            list(loader)


def with_small(*transforms, **settings):
    return lambda path: door.Loader(
        path, 8, 2, pipelines=only(small=simple(*transforms)), **settings
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (with_small(batches_ahead=0), "`batch_size`=8 and `batches_ahead`=0 must be 1 or more"),
        (with_small(indices=[3, 60]), "`indices`: 60 is not a sample of the file; use 0 to 59"),
        (
            with_small(indices=[0.5]),
            "`indices`: must be a sequence of integers, not an array of fl",
        ),
        (with_small(order="random"), "`order`='random': must be an OrderOption or a subclass of F"),
        (with_small(distributed=True), "`distributed`=True: this process is in no process group;"),
        (with_small(ToDevice(CPU)), "ToDevice gets an array; put ToTensor before it"),
        (with_small(ToTensor(), Cutout(4)), "Cutout works on arrays and comes after ToTensor; put"),
        (with_small(ToTensor(), abs), "is neither an operation of FFCV nor a torch.nn.Module"),
        (
            with_small(ToTensor(), NormalizeImage(MEAN, STD, np.float32)),
            "NormalizeImage needs uint8 images",
        ),
        (
            lambda path: door.Loader(path, 8),
            r"`pipelines`\['large'\]: SimpleRGBImageDecoder only s",
        ),
        (
            lambda path: door.Loader(path, 8, pipelines=only(x=[ToTensor()])),
            "the file has no field",
        ),
        (
            lambda path: door.Loader(path, 8, pipelines=only(small=5)),
            r"`pipelines`\['small'\]=5: mus",
        ),
        (
            lambda path: door.Loader(
                path, 8, pipelines=only(a=PipelineSpec(RandomHorizontalFlip()))
            ),
            "continues from RandomHorizontalFlip, which is in no pipeline before it",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(mixed, make, message):
    with pytest.raises(InputError, match=message) as caught:
        make(mixed)
    assert "\n" not in str(caught.value)


def test_operation_that_cannot_be_compiled_is_named(mixed):
    loader = door.Loader(mixed, 8, 2, pipelines=only(small=simple(Half(), ToTensor())))
    with pytest.raises(
        InputError, match="ModuleWrapper cannot be compiled: .*; correct it"
    ) as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_square_that_is_larger_than_the_image_is_refused(mixed):
    loader = door.Loader(mixed, 8, 2, pipelines=only(small=simple(Cutout(SIDE + 1), ToTensor())))
    with pytest.raises(InputError, match="sample 0 was given parameters that are out of range"):
        list(loader)


@pytest.mark.parametrize("change", ["text pointer", "array pointer"])
def test_pointer_outside_the_file_is_refused(mixed, tmp_path, change):
    from rsb_ffcv.beton import FIELD, HEADER, read_structure

    structure = read_structure(mixed)
    metadata = structure.metadata.copy()
    column = metadata[f"f{OTHERS.index(change.split()[0].replace('array', 'points'))}"]
    if column.dtype.names:
        column["ptr"][7] = 2**63
    else:
        column[7] = 2**63
    data = bytearray(mixed.read_bytes())
    at = HEADER.itemsize + len(structure.fields) * FIELD.itemsize
    data[at : at + metadata.nbytes] = metadata.tobytes()
    (tmp_path / "bad.beton").write_bytes(data)
    with pytest.raises(InputError, match="damaged: sample 7 has '(text|points)' outside the file"):
        door.Loader(tmp_path / "bad.beton", 8, pipelines={"small": None, "large": None})


# ---------------------------------------------------------------- operations for FFCV's loader


def core_pipeline(seed=5):
    return [
        door.RandomResizedCropDecoder((24, 20), seed=seed),
        door.RandAugment("rand-m7-mstd0.5-inc1", seed=seed),
        door.ColorJitter(0.2, 0.2, 0.2, seed=seed),
        NormalizeImage(MEAN, STD, np.float32),
        ToTensor(),
        ToTorchImage(),
        door.RandomErasing(0.5, seed=seed),
    ]


def begin(operations, epoch):
    for operation in operations:
        if hasattr(operation, "set_epoch"):
            operation.set_epoch(epoch)


def test_core_operations_give_the_same_in_both_loaders(mixed):
    """In file order, a sample's index is its slot."""
    found: list[list] = []
    for kind in (Stock, door.Loader):
        operations = core_pipeline()
        settings: dict[str, Any] = {
            "batch_size": 13,
            "num_workers": 2,
            "drop_last": False,
            "seed": 5,
        }
        loader = kind(mixed, **settings, pipelines=only(large=operations))
        found.append([])
        for epoch in range(2):
            begin(operations, epoch)
            found[-1].append(joined(*epochs(loader)))
    for theirs, mine in zip(*found):
        assert np.array_equal(theirs, mine)
    assert not np.array_equal(*found[0])


def test_evaluation_crop_gives_the_same_in_both_loaders(mixed):
    found = [
        joined(
            *epochs(
                kind(
                    str(mixed),
                    20,
                    2,
                    pipelines=only(large=[door.CenterCropDecoder(24, 0.9), ToTensor()]),
                )
            )
        )
        for kind in (Stock, door.Loader)
    ]
    assert np.array_equal(*found)


@pytest.mark.long
def test_repeated_draws_are_refused_in_ffcvs_loader(mixed):
    """The error is raised where the loader is iterated, instead of a hang."""
    for name in ("RandomResizedCropDecoder", "RandAugment", "RandomErasing"):
        operations = [decoders.CenterCropRGBImageDecoder((24, 24), 1.0)]
        if name == "RandomResizedCropDecoder":
            operations = [door.RandomResizedCropDecoder(24)]
        elif name == "RandAugment":
            operations.append(door.RandAugment("rand-m7"))
        else:
            operations += [
                NormalizeImage(MEAN, STD, np.float32),
                ToTensor(),
                ToTorchImage(),
                door.RandomErasing(0.5),
            ]
        loader = Stock(mixed, 8, 1, pipelines=only(large=operations))
        list(loader)
        with pytest.raises(InputError, match=f"{name}: a second epoch with the draws of epoch 0; "):
            list(loader)
        begin(operations, 1)
        assert len(list(loader)) == 7
        twice = Stock(
            str(mixed),
            8,
            1,
            indices=[*range(8), 3, *range(8, 15)],
            pipelines=only(large=operations),
        )
        begin(operations, 2)
        with pytest.raises(
            InputError, match=f"{name}: sample 3 comes twice in epoch 2, with the sam"
        ):
            list(twice)


def test_damage_is_reported_in_ffcvs_loader(mixed, tmp_path):
    data = bytearray(mixed.read_bytes())
    at = data.index(b"\xff\xd8\xff")
    data[at : at + 30] = b"\0" * 30
    (tmp_path / "broken.beton").write_bytes(data)
    for order in (SEQUENTIAL, RANDOM):
        loader = Stock(
            str(tmp_path / "broken.beton"),
            3,
            2,
            order=order,
            pipelines=only(large=[door.RandomResizedCropDecoder(24), ToTensor()]),
        )
        with pytest.raises(
            InputError, match="sample [0-9]+ is not a decodable JPEG; write the file"
        ):
            list(loader)
