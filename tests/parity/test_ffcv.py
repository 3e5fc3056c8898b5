"""Stock ffcv reads the files of this project, and this project reads the files of stock ffcv."""

import shutil
import subprocess
import sys
import textwrap

import numpy as np
import torch
from torch.nn.functional import avg_pool2d
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop

from rsb_ffcv.beton import JPG, RAW, read_beton
from rsb_ffcv.dataset import Encoding, Place, concat, subset, write_splits
from rsb_ffcv.loading import EvalLoader
from rsb_ffcv.ops import crop, draws


def run_stock(code: str) -> str:
    """Runs code that uses stock ffcv in a separate process, because ffcv's compiler settings are
    global. Returns its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stock_loader_reads_our_files(betons, pictures, tmp_path):
    """The labels are equal, and the images are as close as ffcv's faster DCT and INTER_AREA allow:
    for JPEGs that were stored unchanged, for raw and mixed files, for files with skipped pictures,
    and for a file to which another one was appended."""
    (tmp_path / "in").mkdir()
    shutil.copytree(pictures / "val", tmp_path / "in" / "val")
    (tmp_path / "in" / "val" / "amber" / "0_bad.jpg").write_bytes(b"bad")
    for mode in ("jpg", "raw", "smart", "proportion"):
        write_splits(
            Place(dataset="imagenet", data_dir=str(tmp_path / "in")),
            f"{tmp_path}/{mode}.beton",
            split="val",
            num_workers=1,
            skip=True,
            max_skipped=0.1,
            encoding=Encoding(mode=mode, smart_threshold=12000),
        )
    subset(
        str(tmp_path / "raw.beton"), str(tmp_path / "appended.beton"), num_workers=1, samples="0-13"
    )
    subset(
        str(tmp_path / "jpg.beton"), str(tmp_path / "rest.beton"), num_workers=1, samples="14-26"
    )
    concat(str(tmp_path / "appended.beton"), [str(tmp_path / "rest.beton")], 1)
    names = ["jpg", "raw", "smart", "proportion", "appended"]
    run_stock(f"""
        import numpy as np, torch
        from ffcv.loader import Loader, OrderOption
        from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
        from ffcv.transforms import ToTensor
        for name in {names!r}:
            pipelines = {{"image": [CenterCropRGBImageDecoder((32, 32), 0.9), ToTensor()],
                         "label": [IntDecoder(), ToTensor()]}}
            loader = Loader(f"{tmp_path}/{{name}}.beton", batch_size=8, num_workers=1,
                            order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines)
            images, labels = zip(*[(i.clone(), l.clone()) for i, l in loader])
            torch.save((torch.cat(images), torch.cat(labels)[:, 0]), f"{tmp_path}/{{name}}.pt")
    """)
    for name in names:
        images, labels = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        ours = EvalLoader(
            tmp_path / f"{name}.beton",
            batch_size=8,
            resolution=32,
            num_workers=2,
            crop_ratio=0.9,
            interpolation="bilinear",
        )
        batches = list(ours)
        our_images = torch.cat([batch.images for batch in batches])
        our_labels = torch.cat([batch.labels for batch in batches])
        assert torch.equal(our_labels, labels) and len(labels) == 27
        mine, stock = (
            avg_pool2d(batch.permute(0, 3, 1, 2).float(), 8) for batch in (our_images, images)
        )
        own, other = (
            (mine - shifted).abs().mean((1, 2, 3)) for shifted in (stock, stock.roll(1, 0))
        )
        assert own.mean() < 4 and (own < 8).all() and own.mean() < other.mean() / 4, (
            name,
            own,
            other,
        )


def test_files_of_the_stock_writer_are_read(pictures, tmp_path):
    kinds = {"raw": {RAW}, "jpg": {JPG}, "proportion": {JPG, RAW}, "smart": {JPG, RAW}}
    run_stock(f"""
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
        from torchvision.datasets import ImageFolder
        for mode in {list(kinds)!r}:
            image = RGBImageField(write_mode=mode, smart_threshold=12000)
            writer = DatasetWriter(f"{tmp_path}/{{mode}}.beton",
                                   {{"image": image, "label": IntField()}}, num_workers=2)
            writer.from_indexed_dataset(ImageFolder({str(pictures / "val")!r}))
    """)
    for mode, stored in kinds.items():
        path = tmp_path / f"{mode}.beton"
        file = read_beton(path)
        assert (
            len(file) == 27
            and np.bincount(file.labels).tolist() == [9, 9, 9]
            and set(file.modes) == stored
        )
        images = torch.cat(
            [
                images
                for images, *_ in EvalLoader(
                    path, batch_size=8, resolution=32, num_workers=2, crop_ratio=1.0
                )
            ]
        )
        assert torch.equal(images.float().mean((1, 2)).argmax(1), torch.from_numpy(file.labels))


def test_crops_equal_torchvisions_on_the_same_draws(monkeypatch):
    """torchvision's get_params runs in double precision with the draws of each address. Try t uses
    words 4t .. 4t + 3 (area, aspect, top, left); if it does not fit, the last two stay unused."""
    log = torch.log
    for slot in range(500):
        height, width = (int(side) for side in np.random.default_rng(slot).integers(20, 600, 2))
        used: list[None] = []

        def next_word(first_of_try: bool, used=used):
            if first_of_try and len(used) % 2 == 0:
                used[:] = range(-(-len(used) // 4) * 4)
            used.append(None)
            return len(used) - 1

        class Uniform:
            def uniform_(self, low, high, slot=slot, next_word=next_word):
                share = draws.uniform(0, 0, slot, draws.CROP, next_word(True))
                return torch.tensor(
                    float(low) + (float(high) - float(low)) * share, dtype=torch.float64
                )

        def randint(low, high, size, slot=slot, next_word=next_word):
            return torch.tensor([draws.below(0, 0, slot, draws.CROP, next_word(False), high)])

        picture = torch.zeros(3, height, width)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", lambda *_, **__: Uniform())
            patched.setattr(torch, "randint", randint)
            patched.setattr(torch, "log", lambda x: log(x.double()))
            theirs = TorchvisionCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3])
        ours = crop.random_resized_crop_box(0, 0, slot, height, width, 0.08, 1.0, 3 / 4, 4 / 3)
        assert tuple(ours) == tuple(theirs), slot


def test_crops_lie_in_the_image_and_have_torchvisions_distribution():
    from scipy import stats

    height, width = 75, 130
    ours = np.array(
        [
            crop.random_resized_crop_box(0, 0, slot, height, width, 0.08, 1.0, 3 / 4, 4 / 3)
            for slot in range(6000)
        ]
    )
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    torch.manual_seed(0)
    picture = torch.zeros(3, height, width)
    theirs = np.array(
        [TorchvisionCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    )
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001


def test_a_crop_that_never_fits_falls_back_as_torchvisions_does():
    for height, width in ((10, 1000), (1000, 10), (3, 3000)):
        box = crop.random_resized_crop_box(0, 0, 0, height, width, 1.0, 1.0, 3 / 4, 4 / 3)
        assert tuple(box) == tuple(
            TorchvisionCrop.get_params(torch.zeros(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
        )
