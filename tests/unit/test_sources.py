"""Every supported form of ImageNet gives the same labelled images, and errors name the file that is
wrong."""

import errno
import functools
import http.server
import io
import json
import os
import re
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsb_ffcv import InputError
from rsb_ffcv.beton import read_beton
from rsb_ffcv.dataset import Encoding, Place, files, write_splits
from tests import sources
from tests.sources import WNIDS, WORDS, contents, expected, pictures, put, put_tar


def write(tmp_path, place: Place, split: str = "", num_workers: int = 2, **options) -> Path:
    write_splits(
        place, str(tmp_path / "out") + "/", split=split, num_workers=num_workers, **options
    )
    return tmp_path / "out"


FORMS: dict[str, tuple[Callable[..., None], str, str]] = {
    "folders": (sources.folders, "imagenet", ""),
    "archives, meta.mat": (sources.archives, "imagenet_archives", ""),
    "archives, text tables, unpacked": (
        functools.partial(sources.archives, mat=False, packed=False),
        "imagenet_archives",
        "",
    ),
    "archives, truth as .mat": (
        functools.partial(sources.archives, truth_as_mat=True),
        "imagenet_archives",
        "",
    ),
    "kaggle": (sources.kaggle, "kaggle", ""),
    "webdataset, cls": (sources.webdataset, "webdataset", ""),
    "webdataset, json, braces": (
        functools.partial(sources.webdataset, with_json=True),
        "webdataset",
        "/imagenet-{split}-{0000..0001}.tar",
    ),
    "parquet": (sources.parquet, "parquet", ""),
    "parquet, plain, by pattern": (
        functools.partial(sources.parquet, hugging_face=False),
        "parquet",
        "/{split}*.parquet",
    ),
    "datasets": (sources.parquet, "datasets", ""),
    "csv, names": (functools.partial(sources.lists, numbers=False, head=True), "csv", ""),
    "csv, numbers, no head": (
        functools.partial(sources.lists, numbers=True, head=False),
        "csv",
        "",
    ),
    "tiny imagenet": (sources.tiny_imagenet, "tiny_imagenet", ""),
}
NAMED = {
    name
    for name, (make, *_) in FORMS.items()
    if "webdataset" not in name and "plain" not in name and "numbers" not in name
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_labelled_images(form, tmp_path):
    make, dataset, pattern = FORMS[form]
    make(tmp_path / "in")
    if "plain" in form:
        for path in (tmp_path / "in").glob("validation*"):
            path.rename(path.with_name(path.name.replace("validation", "val")))
    out = write(tmp_path, Place(dataset=dataset, data_dir=f"{tmp_path / 'in'}{pattern}"))
    for split in ("train", "val"):
        assert contents(out / f"{split}.beton") == expected(split)
        about = read_beton(out / f"{split}.beton").about
        assert about.classes == (WNIDS if form in NAMED else ["0", "1", "2"])
        assert not about.titles or about.titles[0].startswith("tench")
        assert about.counts == {"kept": len(expected(split)), "encoded": 0, "raw": 0, "left out": 0}
        assert about.source["dataset"] == dataset and about.source["split"] == split


def test_tar_of_folders_is_read_in_place(tmp_path):
    out = write(
        tmp_path, Place(dataset="imagenet", data_dir=str(sources.tar_of_folders(tmp_path / "in")))
    )
    assert all(contents(out / f"{split}.beton") == expected(split) for split in ("train", "val"))
    put_tar(
        tmp_path / "flat.tar", [(f"{wnid}/{name}", data) for wnid, name, data in pictures("train")]
    )
    with pytest.raises(InputError, match="same images"):
        write(tmp_path / "x", Place(dataset="imagenet", data_dir=str(tmp_path / "flat.tar")))
    out = write(
        tmp_path / "flat", Place(dataset="imagenet", data_dir=str(tmp_path / "flat.tar")), "train"
    )
    assert contents(out / "train.beton") == expected("train")
    put_tar(
        tmp_path / "only_train.tar",
        [(f"train/{wnid}/{name}", data) for wnid, name, data in pictures("train")],
    )
    with pytest.raises(InputError, match="no folder val"):
        write(
            tmp_path / "y",
            Place(dataset="imagenet", data_dir=str(tmp_path / "only_train.tar")),
            "val",
        )


def test_callable_gives_pairs_of_path_and_class(tmp_path, monkeypatch):
    sources.lists(tmp_path / "in", numbers=False, head=True)
    (tmp_path / "my_data.py").write_text(
        "def pairs(split):\n    return [line.split(',') for line in "
        "open(f'in/{split}.csv').read().split()[1:]]\n"
    )
    monkeypatch.chdir(tmp_path)
    out = write(tmp_path, Place(dataset="callable", data_dir="in", callable="my_data:pairs"))
    assert (
        contents(out / "val.beton") == expected("val")
        and read_beton(out / "val.beton").about.classes == WNIDS
    )
    for wrong in ("my_data", "my_data:absent", "absent:pairs"):
        with pytest.raises(InputError, match="`callable`"):
            write(tmp_path, Place(dataset="callable", data_dir="in", callable=wrong))


def test_unpacked_imagenette_is_read(tmp_path):
    from torchvision.datasets import Imagenette

    wnids = sorted(Imagenette._WNID_TO_CLASS)
    for split, count in (("train", 2), ("val", 1)):
        for label, wnid in enumerate(wnids):
            for number in range(count):
                put(
                    tmp_path / "imagenette2" / split / wnid / f"{wnid}_{number}.JPEG",
                    sources.jpeg(label % 3, 10 * label + number),
                )
    out = write(tmp_path, Place(dataset="imagenette", data_dir=str(tmp_path)))
    assert contents(out / "train.beton") == sorted(
        (label, sources.jpeg(label % 3, 10 * label + number))
        for label in range(10)
        for number in range(2)
    )
    about = read_beton(out / "val.beton").about
    assert (
        about.classes == wnids
        and about.titles[0].startswith("tench")
        and read_beton(out / "val.beton").names()[0] == f"{wnids[0]}/{wnids[0]}_0.JPEG"
    )


def test_class_names_can_be_given(tmp_path):
    sources.webdataset(tmp_path / "in")
    (tmp_path / "names.txt").write_text("\n".join(WNIDS))
    out = write(
        tmp_path,
        Place(
            dataset="webdataset",
            data_dir=str(tmp_path / "in"),
            class_names=str(tmp_path / "names.txt"),
        ),
    )
    about = read_beton(out / "train.beton").about
    assert about.classes == WNIDS and about.titles[1].startswith("goldfish")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match="`class_names`.*2 lines"):
        write(
            tmp_path,
            Place(
                dataset="webdataset",
                data_dir=str(tmp_path / "in"),
                class_names=str(tmp_path / "names.txt"),
            ),
        )


# ---- remote --------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """A web server of one folder that answers range requests, as object stores do.

    lost: the number of following requests whose connections it closes.
    """

    lost = 0

    def __init__(self, folder):
        self.requests_seen: list[tuple[str, str | None]] = []
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, directory=str(folder), **options)

            def do_GET(self):
                outer.requests_seen.append((self.path, self.headers.get("Range")))
                if outer.lost:
                    outer.lost -= 1
                    self.connection.close()
                    return
                path = self.translate_path(self.path)
                requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if not requested or not os.path.isfile(path):
                    super().do_GET()
                    return
                data = Path(path).read_bytes()
                first = int(requested[1])
                last = min(int(requested[2] or len(data)), len(data) - 1)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                self.send_header("Content-Length", str(last - first + 1))
                self.end_headers()
                self.wfile.write(data[first : last + 1])

            def end_headers(self):
                self.send_header("Accept-Ranges", "bytes")
                super().end_headers()

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # a client has disconnected


@pytest.fixture
def server(tmp_path):
    (tmp_path / "in").mkdir()
    server = Server(tmp_path)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "form",
    [
        "folders",
        "archives, meta.mat",
        "kaggle",
        "webdataset, json, braces",
        "parquet",
        "csv, names",
        "tiny imagenet",
    ],
)
def test_forms_are_read_from_a_web_server(form, tmp_path, server):
    make, dataset, pattern = FORMS[form]
    shutil.rmtree(tmp_path / "in")
    make(tmp_path / "in")
    out = write(tmp_path, Place(dataset=dataset, data_dir=f"{server.url}/in{pattern}"))
    assert all(contents(out / f"{split}.beton") == expected(split) for split in ("train", "val"))


def test_memory_and_file_urls_are_read(tmp_path):
    import fsspec

    sources.folders(tmp_path / "in")
    out = write(tmp_path / "1", Place(dataset="imagenet", data_dir=f"file://{tmp_path}/in"))
    assert contents(out / "train.beton") == expected("train")
    fsspec.filesystem("memory").put(str(tmp_path / "in"), "/pictures", recursive=True)
    out = write(tmp_path / "2", Place(dataset="imagenet", data_dir="memory://pictures"))
    assert contents(out / "val.beton") == expected("val")


def test_lost_network_is_one_error_line_and_a_rerun_resumes(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setattr(files, "PAUSE", 0.01)
    shutil.rmtree(tmp_path / "in")
    sources.webdataset(tmp_path / "in")
    place = Place(
        dataset="webdataset", data_dir=f"{server.url}/in/imagenet-{{split}}-{{0000..0001}}.tar"
    )
    whole = (write(tmp_path / "whole", place, "train") / "train.beton").read_bytes()
    server.lost = 2  # fewer than the attempts
    assert (write(tmp_path / "hiccup", place, "train") / "train.beton").read_bytes() == whole

    real, calls = files.Remote.read, []

    def breaks_down(self, name, start=0, length=-1):
        calls.append(name)
        if len(calls) == 20:
            server.lost = 1000
        return real(self, name, start, length)

    with monkeypatch.context() as patched:
        patched.setattr(files.Remote, "read", breaks_down)
        with pytest.raises(
            InputError, match=r"127.0.0.1.*cannot be reached.*the same command again"
        ):
            # A lost network is not a bad image, despite skip=True. With one thread, the images
            # before call 20 are finished
            write(tmp_path / "lost", place, "train", num_workers=1, skip=True, max_skipped=1.0)
    assert not (tmp_path / "lost/out/train.beton").exists()
    server.lost = 0
    assert (write(tmp_path / "lost", place, "train") / "train.beton").read_bytes() == whole
    assert "continuing after" in capsys.readouterr().out


def test_server_without_range_requests_is_an_error(tmp_path, server, monkeypatch):
    shutil.rmtree(tmp_path / "in")
    sources.webdataset(tmp_path / "in")
    remote = files.Remote(f"{server.url}/in")
    monkeypatch.setattr(remote.fs, "cat_file", lambda path, start, end: b"x" * 10000)
    with pytest.raises(InputError, match="sends whole files"):
        remote.read("imagenet-train-0000.tar", 0, 100)


def test_unknown_protocol_is_named():
    with pytest.raises(InputError, match="`data_dir`=nonsense://"):
        write_splits(Place(dataset="imagenet", data_dir="nonsense://bucket/x"), "out/")


# ---- faults --------------------------------------------------------------------------------------


def with_fault(root: Path, fault: str) -> str:
    """Writes a folder of images, one of which has a fault. Returns the name of that file."""
    sources.folders(root)
    path = root / "train" / WNIDS[1] / "fault.JPEG"
    whole = sources.jpeg(1, 5)
    stream = io.BytesIO()
    if fault == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif fault == "damaged in the middle":
        path.write_bytes(whole[:900] + bytes(range(256)) + whole[1156:])
    elif fault == "empty":
        path.touch()
    elif fault == "no picture":
        path.write_text("not a picture")
    elif fault == "dangling link":
        path.symlink_to("nowhere.JPEG")
    elif fault == "link out of the tree":
        put(root.parent / "secret.JPEG", whole)
        path.symlink_to(root.parent / "secret.JPEG")
    elif fault == "folder linked out of the tree":
        put(root.parent / "elsewhere" / "fault.JPEG", whole)
        path = root / "train" / WNIDS[1] / "linked"
        path.symlink_to(root.parent / "elsewhere")
    elif fault == "pipe":
        os.mkfifo(path)
    elif fault == "bomb":
        Image.new("1", (30000, 30000)).save(stream, "PNG")
        path.write_bytes(stream.getvalue())
    elif fault == "JPEG bomb":
        path.write_bytes(
            whole[: whole.index(b"\xff\xc0") + 5]
            + b"\xff\xf0\xff\xf0"
            + whole[whole.index(b"\xff\xc0") + 9 :]
        )
    elif fault == "too wide":
        Image.new("L", (70000, 2)).save(stream, "PNG")
        path.write_bytes(stream.getvalue())
    return path.name


FAULTS = {
    "truncated": "not a readable picture",
    "damaged in the middle": "not a readable picture",
    "empty": "it is empty",
    "no picture": "not a readable picture",
    "dangling link": "No such file",
    "link out of the tree": "leaves .*`follow_links`=1",
    "folder linked out of the tree": "leaves .*`follow_links`=1",
    "pipe": "not a regular file",
    "bomb": "30000 x 30000 pixels.*max_pixels",
    "JPEG bomb": "65520 x 65520 pixels.*max_pixels",
    "too wide": "70000 x 2 pixels.*65535 per side",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_image_is_an_error_or_skipped_and_reported(fault, tmp_path, capsys):
    name = with_fault(tmp_path / "in", fault)
    place = Place(dataset="imagenet", data_dir=str(tmp_path / "in"))
    with pytest.raises(InputError, match=f"{name}.*{FAULTS[fault]}"):
        write(tmp_path, place, "train")
    assert not (tmp_path / "out/train.beton").exists()
    with pytest.raises(InputError, match="1 of 13 pictures.*`max_skipped`=0.05"):
        write(tmp_path, place, "train", skip=True, max_skipped=0.05)
    out = write(tmp_path, place, "train", skip=True, max_skipped=0.1)
    assert contents(out / "train.beton") == expected("train")
    shown = capsys.readouterr().out
    assert (
        f"{WNIDS[1]} 4 of 5" in shown
        and "1 picture left out; see " in shown
        and "continuing after" in shown
    )
    head, row = (out / "train.beton.skipped.csv").read_text().splitlines()
    assert (
        head == "path,class,reason"
        and name in row
        and WNIDS[1] in row
        and re.search(FAULTS[fault], row)
    )
    assert read_beton(out / "train.beton").about.counts["left out"] == 1


def test_links_are_followed_if_allowed(tmp_path):
    for fault in ("link out of the tree", "folder linked out of the tree"):
        with_fault(tmp_path / fault, fault)
        out = write(
            tmp_path / f"{fault} out",
            Place(dataset="imagenet", data_dir=str(tmp_path / fault), follow_links=True),
            "train",
        )
        assert len(read_beton(out / "train.beton")) == 13
    # The root itself may be a link
    (tmp_path / "named").symlink_to(tmp_path / "link out of the tree")
    (tmp_path / "link out of the tree/train" / WNIDS[1] / "fault.JPEG").unlink()
    assert (
        len(
            read_beton(
                write(
                    tmp_path / "z",
                    Place(dataset="imagenet", data_dir=str(tmp_path / "named")),
                    "train",
                )
                / "train.beton"
            )
        )
        == 12
    )


def test_max_pixels_can_be_raised(tmp_path):
    with_fault(tmp_path / "in", "none")
    stream = io.BytesIO()
    Image.new("L", (30000, 40)).save(stream, "PNG")
    put(tmp_path / "in/train" / WNIDS[0] / "wide.png", stream.getvalue())
    place = Place(dataset="imagenet", data_dir=str(tmp_path / "in"))
    with pytest.raises(InputError, match="30000 x 40 pixels are more than `max_pixels`=1000000"):
        write(tmp_path, place, "train", encoding=Encoding(max_pixels=10**6))
    # Resumes where that call ended
    out = write(tmp_path, place, "train", encoding=Encoding(max_pixels=2 * 10**6))
    assert read_beton(out / "train.beton").widths.max() == 30000


def exotic(kind: str) -> tuple[str, bytes]:
    """An image that is not a plain JPEG: (suffix, bytes)."""
    stream = io.BytesIO()
    picture = Image.fromarray(np.full((24, 32, 3), (200, 120, 40), np.uint8))
    if kind == "CMYK":
        picture.convert("CMYK").save(stream, "JPEG", quality=98)
    elif kind == "16-bit PNG":
        Image.fromarray(np.full((24, 32), 40000, np.uint16)).save(stream, "PNG")
    elif kind == "PNG named JPEG":
        picture.save(stream, "PNG")
        return ".JPEG", stream.getvalue()
    elif kind.startswith("EXIF"):
        exif = Image.Exif()
        exif[0x0112] = int(kind[-1])
        picture.save(stream, "JPEG", exif=exif, quality=98)
    return (".png" if "PNG" in kind else ".jpg"), stream.getvalue()


@pytest.mark.parametrize(
    "kind", ["CMYK", "16-bit PNG", "PNG named JPEG", *(f"EXIF {turn}" for turn in range(1, 9))]
)
def test_images_that_cannot_pass_through_are_encoded_upright(kind, tmp_path):
    suffix, data = exotic(kind)
    sources.folders(tmp_path / "in")
    put(tmp_path / "in/train" / WNIDS[0] / f"0{suffix}", data)  # the first of its class
    out = write(tmp_path, Place(dataset="imagenet", data_dir=str(tmp_path / "in")), "train")
    file = read_beton(out / "train.beton")
    encoded = kind != "EXIF 1"
    assert file.about.counts["encoded"] == encoded and file.names()[0] == f"{WNIDS[0]}/0{suffix}"
    stored = (out / "train.beton").read_bytes()[file.pointers[0] : file.pointers[0] + file.sizes[0]]
    turned = kind in {"EXIF 5", "EXIF 6", "EXIF 7", "EXIF 8"}
    assert (stored != data) == encoded and (file.heights[0], file.widths[0]) == (
        (32, 24) if turned else (24, 32)
    )
    colour = (40000 / 257,) * 3 if kind == "16-bit PNG" else (200, 120, 40)
    assert np.abs(np.asarray(Image.open(io.BytesIO(stored))).astype(float) - colour).max() < 6


@pytest.mark.parametrize(
    "save",
    [
        {},
        {"progressive": True},
        {"subsampling": "4:4:4"},
        {"optimize": True},
        {"restart_marker_blocks": 3},
        {"comment": b"x" * 5000},
    ],
)
def test_jpegs_pass_through_unchanged(save, tmp_path):
    sources.folders(tmp_path / "in")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    for number, picture in enumerate((pixels, pixels[..., 0])):
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "JPEG", **save)
        put(tmp_path / "in/train" / WNIDS[0] / f"0{number}.jpg", stream.getvalue())
    out = write(
        tmp_path,
        Place(dataset="imagenet", data_dir=str(tmp_path / "in")),
        "train",
        encoding=Encoding(max_resolution=60),
    )
    known = [data for label, data in contents(out / "train.beton") if label == 0]
    assert all(
        (tmp_path / f"in/train/{WNIDS[0]}/0{number}.jpg").read_bytes() in known for number in (0, 1)
    )
    out = write(
        tmp_path / "smaller",
        Place(dataset="imagenet", data_dir=str(tmp_path / "in")),
        "train",
        encoding=Encoding(max_resolution=59),
    )
    assert read_beton(out / "train.beton").about.counts["encoded"] == 2
    out = write(
        tmp_path / "encoded",
        Place(dataset="imagenet", data_dir=str(tmp_path / "in")),
        "train",
        encoding=Encoding(pass_through=False),
    )
    assert read_beton(out / "train.beton").about.counts["kept"] == 0


def test_unicode_and_very_long_names_are_kept(tmp_path):
    sources.folders(tmp_path / "in")
    names = [
        "päärynä 梨 🍐.jpg",
        "x" * 240 + ".jpg",
        "line\nbreak.jpg",
        b"latin-\xe9.jpg".decode("utf-8", "surrogateescape"),
    ]
    for number, name in enumerate(names):
        put(tmp_path / "in/train" / WNIDS[0] / name, sources.jpeg(0, 20 + number))
    out = write(tmp_path, Place(dataset="imagenet", data_dir=str(tmp_path / "in")), "train")
    assert {f"{WNIDS[0]}/{name}" for name in names} <= set(read_beton(out / "train.beton").names())


def test_duplicate_name_is_an_error(tmp_path):
    sources.lists(tmp_path / "in", numbers=False, head=True)
    with open(tmp_path / "in/train.csv", "a") as file:
        file.write(f"files/{WNIDS[0]}_0.JPEG,{WNIDS[1]}\n")
    with pytest.raises(InputError, match=f"{WNIDS[0]}_0.JPEG: the source has this name twice"):
        write(tmp_path, Place(dataset="csv", data_dir=str(tmp_path / "in")))
    out = write(
        tmp_path,
        Place(dataset="csv", data_dir=str(tmp_path / "in")),
        "train",
        skip=True,
        max_skipped=0.1,
    )
    assert contents(out / "train.beton") == expected("train")


def test_duplicate_images_are_counted(tmp_path, capsys):
    sources.folders(tmp_path / "in")
    put(tmp_path / "in/train" / WNIDS[2] / "copy.jpg", sources.jpeg(0, 1))
    write(tmp_path, Place(dataset="imagenet", data_dir=str(tmp_path / "in")), "train")
    assert (
        "byte-identical copies of other images: 1; distinct images in two or more classes: 1"
        in capsys.readouterr().out
    )


# ---- invalid archives and lists ------------------------------------------------------------------


@pytest.mark.parametrize(
    "member", ["../escape.jpg", "/absolute.jpg", f"{WNIDS[0]}/../../escape.jpg"]
)
def test_archive_member_cannot_leave_the_archive(member, tmp_path):
    put_tar(
        tmp_path / "x.tar",
        [(member, sources.jpeg(0, 0)), (f"{WNIDS[0]}/1.jpg", sources.jpeg(0, 1))],
    )
    with pytest.raises(InputError, match="not a path inside"):
        write(tmp_path, Place(dataset="imagenet", data_dir=str(tmp_path / "x.tar")), "train")


def test_links_in_archives_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (
            (f"{WNIDS[0]}/1.jpg", sources.jpeg(0, 1)),
            (f"{WNIDS[1]}/1.jpg", sources.jpeg(1, 1)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        member = tarfile.TarInfo(f"{WNIDS[0]}/2.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(InputError, match="2.jpg: is a link or device"):
        write(tmp_path, Place(dataset="imagenet", data_dir=str(tmp_path / "x.tar")), "train")


@pytest.mark.parametrize(
    "path",
    [
        "../secret.jpg",
        "/etc/hostname",
        "http://127.0.0.1/x.jpg",
        "files/../../secret.jpg",
        "a\\..\\..\\b",
    ],
)
def test_listed_path_cannot_leave_its_folder(path, tmp_path):
    sources.lists(tmp_path / "in", numbers=False, head=False)
    with open(tmp_path / "in/train.csv", "a") as file:
        file.write(f"{path},{WNIDS[0]}\n")
    with pytest.raises(InputError, match="not a path inside"):
        write(tmp_path, Place(dataset="csv", data_dir=str(tmp_path / "in")))


@pytest.mark.parametrize("damage", ["cut", "header", "compressed", "text"])
def test_damaged_archive_is_named(damage, tmp_path):
    sources.archives(tmp_path / "in")
    path = tmp_path / "in/ILSVRC2012_img_val.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        second = archive.getmembers()[2].offset
    if damage == "compressed":
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG"))
    else:
        path.write_bytes(
            {
                "cut": whole[: second + 700],
                "header": whole[: second + 20] + b"\xff" * 300 + whole[second + 320 :],
                "text": b"hello " * 1000,
            }[damage]
        )
    with pytest.raises(
        InputError,
        match="ILSVRC2012_img_val.tar: (ends inside|damaged or truncated at byte|not a usable tar)",
    ):
        write(tmp_path, Place(dataset="imagenet_archives", data_dir=str(tmp_path / "in")), "val")


def test_missing_parts_of_a_source_are_named(tmp_path):
    sources.archives(tmp_path / "a")
    (tmp_path / "a/ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(InputError, match="ILSVRC2012_devkit_t12.tar.gz is missing"):
        write(tmp_path, Place(dataset="imagenet_archives", data_dir=str(tmp_path / "a")))
    sources.kaggle(tmp_path / "k")
    (tmp_path / "k/LOC_val_solution.csv").unlink()
    with pytest.raises(InputError, match="LOC_val_solution.csv is missing"):
        write(tmp_path, Place(dataset="kaggle", data_dir=str(tmp_path / "k")))
    sources.webdataset(tmp_path / "w")
    with pytest.raises(InputError, match="0002.tar is missing"):
        write(
            tmp_path,
            Place(
                dataset="webdataset", data_dir=f"{tmp_path}/w/imagenet-{{split}}-{{0000..0002}}.tar"
            ),
        )
    with pytest.raises(InputError, match="same images"):
        write(
            tmp_path,
            Place(dataset="webdataset", data_dir=f"{tmp_path}/w/imagenet-train-{{0000..0001}}.tar"),
        )
    with pytest.raises(InputError, match="is not a folder"):
        write(tmp_path, Place(dataset="imagenet", data_dir=str(tmp_path / "absent")))


def test_sample_without_a_label_is_an_error(tmp_path):
    sources.webdataset(tmp_path / "in")
    with tarfile.open(tmp_path / "in/imagenet-train-0001.tar", "a") as archive:
        for name, data in (("train/zz.jpg", sources.jpeg(0, 9)), ("train/notes.txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(InputError, match="zz.jpg: has no label"):
        write(tmp_path, Place(dataset="webdataset", data_dir=str(tmp_path / "in")))
    out = write(
        tmp_path,
        Place(dataset="webdataset", data_dir=str(tmp_path / "in")),
        "train",
        skip=True,
        max_skipped=0.1,
    )
    assert contents(out / "train.beton") == expected("train")


def test_parquet_without_labelled_images_is_named(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet as pq

    (tmp_path / "in").mkdir()
    pq.write_table(
        pa.table({"image": [b"x"], "fine": [1], "coarse": [2]}), tmp_path / "in/train.parquet"
    )
    with pytest.raises(InputError, match="`label_column`.*fine, coarse"):
        write(tmp_path, Place(dataset="parquet", data_dir=str(tmp_path / "in")), "train")
    (tmp_path / "in/train.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InputError, match="not a parquet file of images"):
        write(tmp_path, Place(dataset="parquet", data_dir=str(tmp_path / "in")), "train")
    data = [sources.jpeg(0, 0), None, sources.jpeg(2, 2)]
    pq.write_table(
        pa.table({"image": pa.array(data, pa.binary()), "fine": [0, 1, 2], "coarse": [0, None, 0]}),
        tmp_path / "in/train.parquet",
    )
    place = Place(dataset="parquet", data_dir=str(tmp_path / "in"), label_column="fine")
    with pytest.raises(InputError, match="row 1 has no image"):
        write(tmp_path, place, "train")
    out = write(tmp_path, place, "train", skip=True, max_skipped=0.5)
    assert [label for label, _ in contents(out / "train.beton")] == [0, 2]


def test_missing_dataset_is_one_error_line(tmp_path, monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    with pytest.raises(
        InputError, match="`data_dir`=nobody/nothing: the datasets library cannot load it"
    ):
        write(tmp_path, Place(dataset="datasets", data_dir="nobody/nothing"))


def test_lost_mount_is_not_a_bad_file(tmp_path, monkeypatch):
    sources.folders(tmp_path / "in")

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    local = files.Local(str(tmp_path / "in"), False)
    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(InputError, match="cannot be reached") as raised:
        local.read(f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG")
    assert raised.type is InputError


def test_devkit_of_other_classes_is_rejected(tmp_path):
    sources.archives(tmp_path / "in", mat=False, packed=False)
    table = tmp_path / "in/ILSVRC2012_devkit_t12/data/map_clsloc.txt"
    table.write_text(table.read_text().replace(WNIDS[2], "n09999999"))
    with pytest.raises(InputError, match="its classes differ from the devkit's.*n01484850"):
        write(tmp_path, Place(dataset="imagenet_archives", data_dir=str(tmp_path / "in")))
    table.write_text("nonsense")
    with pytest.raises(InputError, match="the devkit's tables cannot be used"):
        write(tmp_path, Place(dataset="imagenet_archives", data_dir=str(tmp_path / "in")))


def test_titles_come_from_the_source(tmp_path):
    sources.kaggle(tmp_path / "in")
    assert (
        read_beton(
            write(tmp_path, Place(dataset="kaggle", data_dir=str(tmp_path / "in"))) / "train.beton"
        ).about.titles
        == WORDS
    )


# ---- formats, changed sources, unsafe names ------------------------------------------------------


@pytest.mark.parametrize("kind", ["CMYK", "extended", "PNG"])
def test_damage_is_detected_in_other_formats(kind, tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8))
    stream = io.BytesIO()
    if kind == "PNG":
        picture.save(stream, "PNG")
    else:
        picture.convert("CMYK" if kind == "CMYK" else "RGB").save(stream, "JPEG", quality=80)
    whole = bytearray(stream.getvalue())
    if kind == "extended":
        whole[whole.index(b"\xff\xc0") + 1] = 0xC1
    encoding = Encoding()
    assert encoding.store(0, bytes(whole), "x").how == "encoded"
    for _ in range(20):
        damaged = bytearray(whole)
        at = int(rng.integers(len(whole) // 3, len(whole) - 200))
        if kind == "PNG":
            damaged[at] ^= 1 << int(rng.integers(8))
        else:
            # An early end marker: other damage may decode by chance
            damaged[at : at + 2] = b"\xff\xd9"
        with pytest.raises(InputError, match="x: not a readable picture"):
            encoding.store(0, bytes(damaged), "x")


@pytest.mark.parametrize("turn", range(1, 9))
def test_tiff_orientation_is_applied_once(turn):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = turn
    back = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x, 3),
    }[turn]
    Image.fromarray(np.ascontiguousarray(back(upright))).save(stream, "TIFF", exif=exif)
    from rsb_ffcv.dataset.picture import load_rgb

    assert np.array_equal(load_rgb(stream.getvalue(), "x"), upright)


def test_unsafe_formats_are_not_opened():
    """ICO hides the size of its images, EPS starts a program."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "ICO")
    for data in (stream.getvalue(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(InputError, match="unknown format"):
            Encoding().store(0, data, "x")


def test_changed_images_under_the_same_names_are_detected(tmp_path, capsys):
    from rsb_ffcv.dataset import writer

    for root, side in (("one", 40), ("two", 30)):
        for number in range(30):
            put(
                tmp_path / root / "train" / WNIDS[0] / f"{number:02d}.jpg",
                sources.jpeg(0, number, side),
            )
    one, two = (Place(dataset="imagenet", data_dir=str(tmp_path / root)) for root in ("one", "two"))
    write(tmp_path, one, "train")
    with pytest.raises(InputError, match="has changed since it was written"):
        write(tmp_path, two, "train")
    real = writer._Part.add

    def killed(self, index, *rest):
        if index == 20:
            raise InputError("stopped")
        real(self, index, *rest)

    writer._Part.add = killed  # type: ignore[method-assign]  # restored below
    try:
        with pytest.raises(InputError, match="stopped"):
            write(tmp_path / "x", one, "train")
    finally:
        writer._Part.add = real  # type: ignore[method-assign]
    # The first image has another size and time
    with pytest.raises(InputError, match="the unfinished file has other pictures"):
        write(tmp_path / "x", two, "train")
    replaced = tmp_path / "one" / "train" / WNIDS[0] / "10.jpg"
    replaced.write_bytes(sources.jpeg(0, 11, 50))
    assert len(read_beton(write(tmp_path / "x", one, "train") / "train.beton")) == 30
    assert "continuing after 10 of 30" in capsys.readouterr().out  # from the replaced one on
    assert (tmp_path / "x/out/train.beton").read_bytes() == (
        write(tmp_path / "y", one, "train") / "train.beton"
    ).read_bytes()


def test_rerun_with_a_smaller_subset_equals_a_fresh_run(tmp_path, monkeypatch):
    from rsb_ffcv.dataset import writer

    sources.folders(tmp_path / "in")
    place = Place(dataset="imagenet", data_dir=str(tmp_path / "in"))

    def killed(*_, **__):
        raise InputError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "read_back", killed)
        with pytest.raises(InputError, match="stopped"):
            write(tmp_path, place, "train")
    assert (write(tmp_path, place, "train", subset=7) / "train.beton").read_bytes() == (
        write(tmp_path / "fresh", place, "train", subset=7) / "train.beton"
    ).read_bytes()


def test_removed_folder_is_not_a_bad_image(tmp_path):
    sources.folders(tmp_path / "in")
    local = files.Local(str(tmp_path / "in"), False)
    name = f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG"
    (tmp_path / "in/train").rename(tmp_path / "in/gone")
    with pytest.raises(InputError, match="cannot be reached") as raised:
        local.read(name)
    assert raised.type is InputError


def test_exhausted_resources_are_not_a_bad_image(tmp_path, monkeypatch):
    sources.folders(tmp_path / "in")
    local = files.Local(str(tmp_path / "in"), False)

    def full(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full)
        with pytest.raises(InputError) as raised:
            local.read(f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG")
    assert raised.type is InputError
    from rsb_ffcv.ops import native

    monkeypatch.setattr(native.library, "rsb_decode", lambda *_: native.NO_MEMORY)
    with pytest.raises(InputError, match="not enough memory") as raised:
        Encoding(pass_through=False).store(0, sources.jpeg(0, 0), "x")
    assert raised.type is InputError


def test_skipped_image_is_included_after_its_repair(tmp_path):
    from rsb_ffcv.dataset import writer

    name = with_fault(tmp_path / "in", "truncated")
    place = Place(dataset="imagenet", data_dir=str(tmp_path / "in"))
    fault, real = tmp_path / "in/train" / WNIDS[1] / name, writer._finish

    def killed(*_, **__):
        raise InputError("stopped")

    writer._finish = killed
    try:
        with pytest.raises(InputError, match="stopped"):
            write(tmp_path, place, "train", skip=True, max_skipped=0.1)
    finally:
        writer._finish = real
    fault.write_bytes(sources.jpeg(1, 5))
    out = write(tmp_path, place, "train", skip=True, max_skipped=0.1)
    assert (
        len(read_beton(out / "train.beton")) == 13
        and not (out / "train.beton.skipped.csv").exists()
    )


def test_ignored_members_of_a_shard_are_reported(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    put_tar(
        tmp_path / "in/x-train.tar",
        [
            ("a.jpg", sources.jpeg(0, 0)),
            ("a.cls", b"0"),
            ("b.cls", b"1"),
            ("c.left.jpg", sources.jpeg(0, 2)),
            ("c.right.jpg", sources.jpeg(0, 3)),
            ("c.cls", b"1"),
            ("d.jfif", sources.jpeg(0, 4)),
            ("d.cls", b"1"),
        ],
    )
    out = write(tmp_path, Place(dataset="webdataset", data_dir=str(tmp_path / "in")), "train")
    assert len(read_beton(out / "train.beton")) == 3
    assert (
        "2 members left out (no image with their key, or a second one): b.cls, "
        "c.right.jpg" in capsys.readouterr().err
    )


def test_archive_cut_between_members_and_missing_images_are_detected(tmp_path):
    sources.archives(tmp_path / "a")
    path = tmp_path / "a/ILSVRC2012_img_val.tar"
    with tarfile.open(path) as archive:
        cut = archive.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="damaged or truncated at byte"):
        write(tmp_path, Place(dataset="imagenet_archives", data_dir=str(tmp_path / "a")), "val")
    with open(path, "ab") as file:
        file.write(bytes(1024))
    with pytest.raises(InputError, match="contains 4 images, and the ground truth 6"):
        write(tmp_path, Place(dataset="imagenet_archives", data_dir=str(tmp_path / "a")), "val")
    sources.kaggle(tmp_path / "k")
    (tmp_path / "k/ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000003.JPEG").unlink()
    with pytest.raises(InputError, match="ILSVRC2012_val_00000003.JPEG: cannot be read"):
        write(tmp_path, Place(dataset="kaggle", data_dir=str(tmp_path / "k")), "val")


def test_archive_with_a_negative_size_is_rejected(tmp_path):
    put_tar(
        tmp_path / "x.tar", [(f"{wnid}/{name}", data) for wnid, name, data in pictures("train")]
    )
    whole = bytearray((tmp_path / "x.tar").read_bytes())
    whole[124:136] = (0xFF << 88 | (-1024) & ((1 << 88) - 1)).to_bytes(12)
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    (tmp_path / "x.tar").write_bytes(whole)
    with pytest.raises(InputError, match="x.tar: (damaged|not a usable tar)"):
        write(tmp_path, Place(dataset="imagenet", data_dir=str(tmp_path / "x.tar")), "train")


def test_dataset_cannot_refer_to_files_outside_of_it(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet as pq

    put(tmp_path / "secret.jpg", sources.jpeg(0, 0))
    (tmp_path / "in").mkdir()
    rows = [
        {"bytes": sources.jpeg(0, 1), "path": "a.jpg"},
        {"bytes": None, "path": str(tmp_path / "secret.jpg")},
    ]
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    table = pa.table({"image": pa.array(rows), "label": [0, 1]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, tmp_path / "in" / "train.parquet")
    with pytest.raises(InputError, match="secret.jpg, which is outside the dataset"):
        write(tmp_path, Place(dataset="datasets", data_dir=str(tmp_path / "in")), "train")


def test_file_url_does_not_follow_links(tmp_path):
    name = with_fault(tmp_path / "in", "link out of the tree")
    with pytest.raises(InputError, match=f"{name}.*leaves"):
        write(tmp_path, Place(dataset="imagenet", data_dir=f"file://{tmp_path}/in"), "train")


def test_invalid_names_are_replaced_and_duplicate_classes_rejected(tmp_path):
    from rsb_ffcv.dataset.sources import Source

    source = Source(
        classes=["a", "b\ud800"], names=["x\0y.jpg", "z.jpg"], labels=np.array([0, 1]), read=None
    )
    assert source.names[0] == "x_y.jpg" and source.classes[1] == "b?"
    sources.parquet(tmp_path / "in")
    (tmp_path / "names.txt").write_text("a\nb\na\n")
    with pytest.raises(InputError, match="`class_names`.*2 different"):
        write(
            tmp_path,
            Place(
                dataset="parquet",
                data_dir=str(tmp_path / "in"),
                class_names=str(tmp_path / "names.txt"),
            ),
        )


@pytest.mark.parametrize(
    "place, message",
    [
        (
            Place(dataset="webdataset", data_dir="{tmp}/x-{{0000000..9999999}}.tar"),
            "more than 100000 shards",
        ),
        (Place(dataset="imagenet", data_dir="zip://*::{tmp}/no.zip"), "no.zip"),
        (Place(dataset="csv", data_dir="{tmp}/quote.csv"), "not a CSV file"),
    ],
)
def test_invalid_data_dirs_are_one_error_line(place, message, tmp_path):
    (tmp_path / "quote.csv").write_text('a.jpg,x\n"b.jpg,y\n' + "c.jpg,z\n" * 20000)
    place = Place(
        dataset=place.dataset,
        data_dir=place.data_dir.replace("{tmp}", str(tmp_path))
        .replace("{{", "{")
        .replace("}}", "}"),
    )
    with pytest.raises(InputError, match=message):
        write(tmp_path, place, "train")
    with pytest.raises(InputError, match="`write_path`=.*cannot be used"):
        write_splits(place, str(tmp_path / ("x" * 300)), split="train")
