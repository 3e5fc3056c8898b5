"""What a batch holds is a function of (seed, epoch, batch): not of threads, ranks or what was read before."""
import threading

import numpy as np
import pytest
import torch

from rsb_ffcv import InputError
from rsb_ffcv.loading import EvalLoader, TrainLoader
from rsb_ffcv.loading.order import epoch_order, group_slots

SPEC = "rand-m7-mstd0.5-inc1"


def loader(betons, **options):
    options = {"batch_size": 16, "resolution": 32, "num_workers": 2, "rand_augment": SPEC, **options}
    return TrainLoader(betons / "train.beton", **options)


def batches(made, epoch, **options):
    found = [(images.clone(), labels.clone()) for images, labels in made.epoch(epoch, **options)]
    made.close()
    return found


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) and torch.equal(p, q) for (x, p), (y, q) in zip(a, b))


def test_the_order_is_a_new_permutation_each_epoch():
    orders = [epoch_order(0, epoch, 1000) for epoch in range(2)] + [epoch_order(1, 0, 1000)]
    for order in orders:
        assert sorted(order) == list(range(1000))
    assert not (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()
    assert abs(np.corrcoef(orders[0], np.arange(1000))[0, 1]) < 0.1


def test_any_number_of_processes_covers_the_same_slots_of_a_step():
    for world_size in (1, 2, 4):
        per_step = 4 // world_size
        slots = np.concatenate([group_slots(2 * per_step + turn, 8, rank, world_size)
                                for turn in range(per_step) for rank in range(world_size)])
        assert sorted(slots) == list(range(64, 96))


def test_bytes_do_not_depend_on_the_number_of_threads(betons):
    one = batches(loader(betons, num_workers=1), 3)
    assert len(one) == 6 and equal(one, batches(loader(betons, num_workers=4), 3))


def test_epochs_and_seeds_differ(betons):
    first = batches(loader(betons), 0)
    assert not equal(first, batches(loader(betons), 1)) and not equal(first, batches(loader(betons, seed=1), 0))


def test_an_epoch_from_step_k_is_the_tail_of_the_epoch(betons):
    whole = batches(loader(betons, global_batch=32), 2)
    assert equal(whole[4:], batches(loader(betons, global_batch=32), 2, start_step=2))


def test_two_ranks_together_see_what_one_sees(betons):
    alone = batches(loader(betons, global_batch=32), 0)
    ranks = [batches(loader(betons, global_batch=32, rank=rank, world_size=2), 0) for rank in range(2)]
    assert equal(alone, [batch for pair in zip(*ranks) for batch in pair])


def test_draws_belong_to_slots_not_to_places_in_a_batch():
    from rsb_ffcv.loading.batch import erase_boxes
    from rsb_ffcv.ops.crop import RandomResizedCrop
    from rsb_ffcv.ops.operation import Address
    from rsb_ffcv.ops.rand_augment import RandAugment

    slots, sides = np.arange(100, 164), np.full(64, 300, np.uint16)
    for op in (RandomResizedCrop(32), RandAugment(SPEC)):
        whole = op.draw(Address(1, 2, slots), sides, sides)
        part = op.draw(Address(1, 2, slots[20:]), sides[20:], sides[20:])
        for all_of_it, tail in zip(whole, part):
            assert np.array_equal(all_of_it[20:], tail) and not np.array_equal(all_of_it[:44], tail)
    boxes = [erase_boxes(1, 2, chosen, 32, 32, 0.5, 0.02, 0.3, 0.3, 3.0) for chosen in (slots, slots[20:])]
    assert np.array_equal(boxes[0][20:], boxes[1]) and not np.array_equal(boxes[0][:44], boxes[1])


def test_labels_belong_to_their_images(betons):
    for images, labels in batches(loader(betons, rand_augment=""), 0):
        assert torch.equal(images.float().mean((1, 2)).argmax(1), labels)


def test_batches_may_be_kept(betons):
    made = loader(betons)
    kept = list(made.epoch(0))
    copies = [images.clone() for images, _ in kept]
    list(made.epoch(1))
    assert all(torch.equal(images, copy) for (images, _), copy in zip(kept, copies))


def test_evaluation_counts_every_image_once_over_any_number_of_ranks(betons):
    alone = EvalLoader(betons / "val.beton", batch_size=8, resolution=32, num_workers=2, crop_ratio=0.9)
    expected = torch.cat([images for images, _ in alone])
    assert len(expected) == 27
    parts = [EvalLoader(betons / "val.beton", batch_size=4, resolution=32, num_workers=1, crop_ratio=0.9, rank=rank,
                        world_size=4) for rank in range(4)]
    seen = torch.empty_like(expected)
    for rank, part in enumerate(parts):
        images = torch.cat([images for images, _ in part])
        seen[rank::4] = images
    assert torch.equal(seen, expected)


def test_an_undecodable_image_reaches_the_caller_with_its_number(betons, tmp_path):
    data = bytearray((betons / "train.beton").read_bytes())
    from rsb_ffcv.beton import read_beton

    file = read_beton(betons / "train.beton")
    start, size = int(file.pointers[17]), int(file.sizes[17])
    data[start + 2:start + size // 2] = bytes(size // 2 - 2)
    (tmp_path / "train.beton").write_bytes(data)
    with pytest.raises(InputError, match="sample 17 "):
        list(loader(tmp_path).epoch(0))


def test_closing_an_epoch_early_ends_its_thread(betons):
    made = loader(betons)
    before = threading.active_count()
    epoch = made.epoch(0)
    next(epoch)
    epoch.close()
    made.close()
    assert threading.active_count() < before + 1


@pytest.mark.parametrize("options, message", [
    ({"batch_size": 128}, "holds 96"), ({"num_workers": 0}, "data.num_workers=0"),
    ({"global_batch": 24}, "training.global_batch=24"), ({"rand_augment": "rand-x9"}, "x9"),
    ({"rand_augment": "augmix"}, "augmix")])
def test_wrong_settings_are_named(betons, options, message):
    with pytest.raises(InputError, match=message):
        loader(betons, **options)


def test_a_file_that_does_not_fit_in_memory_is_refused_before_it_is_read(betons, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})())
    with pytest.raises(InputError, match="data.in_memory=1"):
        loader(betons).preload()
