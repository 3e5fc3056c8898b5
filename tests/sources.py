"""The same few labelled pictures in every layout in which ImageNet is distributed or stored."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from rsb_ffcv.beton import read_beton

WNIDS = ["n01440764", "n01443537", "n01484850"]
WORDS = ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark, white shark"]
# the devkit numbers the classes in a different order
IDS = {"n01440764": 2, "n01443537": 3, "n01484850": 1}


def jpeg(label: int, number: int, side: int = 40) -> bytes:
    rng = np.random.default_rng([label, number])
    pixels = rng.integers(0, 120, (side + number, side + 2 * label, 3))
    pixels[..., label] += 100
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def pictures(split: str) -> list[tuple[str, str, bytes]]:
    """Returns (wnid, file name, bytes) of each picture: four per class in train, two per class in
    val. The file names of val do not contain the class."""
    if split == "train":
        return [
            (wnid, f"{wnid}_{number}.JPEG", jpeg(label, number))
            for label, wnid in enumerate(WNIDS)
            for number in range(4)
        ]
    order = [2, 0, 1, 1, 2, 0]
    return [
        (WNIDS[label], f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(label, 10 + number))
        for number, label in enumerate(order, 1)
    ]


def put_tar(path, members: list[tuple[str, bytes]]):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def put(path: Path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def folders(root: Path):
    for split in ("train", "val"):
        for wnid, name, data in pictures(split):
            put(root / split / wnid / name, data)


def tar_of_folders(root: Path):
    root.mkdir()
    put_tar(
        root / "all.tar",
        [
            (f"top/{split}/{wnid}/{name}", data)
            for split in ("train", "val")
            for wnid, name, data in pictures(split)
        ],
    )
    return root / "all.tar"


def devkit_tables(root: Path, mat: bool, truth_as_mat: bool = False) -> dict[str, bytes]:
    from scipy.io import savemat

    numbers = [IDS[wnid] for wnid, *_ in pictures("val")]
    tables = {
        "ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{number}\n" for number in numbers
        ).encode()
    }
    if truth_as_mat:
        stream = io.BytesIO()
        savemat(stream, {"truth": np.array(numbers)[:, None]})
        tables = {"ILSVRC2012_validation_ground_truth.mat": stream.getvalue()}
    if mat:
        rows = [(IDS[wnid], wnid, words, "a fish", 0) for wnid, words in zip(WNIDS, WORDS)] + [
            (4, "n00015388", "animal", "a group", 3)
        ]
        kind = [
            ("ILSVRC2012_ID", "O"),
            ("WNID", "O"),
            ("words", "O"),
            ("gloss", "O"),
            ("num_children", "O"),
        ]
        stream = io.BytesIO()
        savemat(stream, {"synsets": np.array(rows, kind)[:, None]})
        tables["meta.mat"] = stream.getvalue()
    else:
        tables["map_clsloc.txt"] = "".join(
            f"{wnid} {IDS[wnid]} {words.split(',')[0].replace(' ', '_')}\n"
            for wnid, words in zip(WNIDS, WORDS)
        ).encode()
    return tables


def archives(root: Path, mat: bool = True, packed: bool = True, truth_as_mat: bool = False):
    root.mkdir()
    inner = []
    for wnid in reversed(WNIDS):  # a different order than that of the labels
        put_tar(
            root / "one.tar", [(name, data) for its, name, data in pictures("train") if its == wnid]
        )
        inner.append((f"{wnid}.tar", (root / "one.tar").read_bytes()))
    (root / "one.tar").unlink()
    put_tar(root / "ILSVRC2012_img_train.tar", inner)
    put_tar(
        root / "ILSVRC2012_img_val.tar",
        [(name, data) for _, name, data in reversed(pictures("val"))],
    )
    tables = devkit_tables(root, mat, truth_as_mat)
    if packed:
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
            for name, data in tables.items():
                member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in tables.items():
            put(root / "ILSVRC2012_devkit_t12" / "data" / name, data)


def kaggle(root: Path):
    for wnid, name, data in pictures("train"):
        put(root / "ILSVRC/Data/CLS-LOC/train" / wnid / name, data)
    lines = ["ImageId,PredictionString"]
    for wnid, name, data in reversed(pictures("val")):
        put(root / "ILSVRC/Data/CLS-LOC/val" / name, data)
        lines.append(f"{Path(name).stem},{wnid} 85 1 499 272 {wnid} 1 2 3 4 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    (root / "LOC_synset_mapping.txt").write_text(
        "".join(f"{wnid} {words}\n" for wnid, words in zip(WNIDS, WORDS))
    )


def webdataset(root: Path, with_json: bool = False):
    root.mkdir()
    for split in ("train", "val"):
        known = pictures(split)
        for shard in range(2):
            members = []
            for number, (wnid, name, data) in list(enumerate(known))[shard::2]:
                key = f"{split}/sample_{number:06d}"
                label = WNIDS.index(wnid)
                beside = (
                    ("json", json.dumps({"label": label, "filename": name}).encode())
                    if with_json
                    else ("cls", str(label).encode())
                )
                members += (
                    [(f"{key}.{beside[0]}", beside[1]), (f"{key}.jpg", data)]
                    if number % 2
                    else [(f"{key}.jpg", data), (f"{key}.{beside[0]}", beside[1])]
                )
            put_tar(root / f"imagenet-{split}-{shard:04d}.tar", members)


def parquet(root: Path, hugging_face: bool = True):
    import pyarrow as pa
    from pyarrow import parquet as pq

    root.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        known = pictures(split)
        for shard in range(2):
            part = known[shard::2]
            labels = pa.array([WNIDS.index(wnid) for wnid, *_ in part])
            if hugging_face:
                table = pa.table(
                    {
                        "image": pa.array(
                            [{"bytes": data, "path": name} for _, name, data in part]
                        ),
                        "label": labels,
                    }
                )
                features = {
                    "image": {"_type": "Image"},
                    "label": {"names": WNIDS, "_type": "ClassLabel"},
                }
                table = table.replace_schema_metadata(
                    {"huggingface": json.dumps({"info": {"features": features}})}
                )
            else:
                table = pa.table(
                    {"jpeg": pa.array([data for *_, data in part], pa.binary()), "target": labels}
                )
            pq.write_table(table, root / f"{name}-{shard:05d}-of-00002.parquet", row_group_size=2)


def lists(root: Path, numbers: bool, head: bool):
    for split in ("train", "val"):
        rows: list[list] = []
        for wnid, name, data in pictures(split):
            put(root / "files" / name, data)
            rows.append([f"files/{name}", WNIDS.index(wnid) if numbers else wnid])
        with open(root / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows(([["path", "label"]] if head else []) + rows)


def tiny_imagenet(root: Path):
    for wnid, name, data in pictures("train"):
        put(root / "train" / wnid / "images" / name, data)
    for _, name, data in pictures("val"):
        put(root / "val" / "images" / name, data)
    (root / "val" / "val_annotations.txt").write_text(
        "".join(f"{name}\t{wnid}\t0\t0\t9\t9\n" for wnid, name, _ in pictures("val"))
    )
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    (root / "words.txt").write_text(
        "".join(f"{wnid}\t{words}\n" for wnid, words in zip(WNIDS, WORDS))
    )


def contents(path) -> list[tuple[int, bytes]]:
    """Returns (label, stored image) of each sample, sorted."""
    file = read_beton(path)
    data = Path(path).read_bytes()
    return sorted(
        (int(label), data[start : start + size])
        for label, start, size in zip(file.labels, file.pointers.tolist(), file.sizes.tolist())
    )


def expected(split: str) -> list[tuple[int, bytes]]:
    return sorted((WNIDS.index(wnid), data) for wnid, _, data in pictures(split))
