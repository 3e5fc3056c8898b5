"""The command app: a Gradio app that answers, and refuses what is no picture."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rsb_ffcv.export import formats
from rsb_ffcv.loading.batch import normalize
from rsb_ffcv.preprocessing import preprocess
from tests.stops import wait_until


@pytest.fixture
def app(exported, betons, command, tmp_path):
    """The folder of an app with three examples."""
    status, out, err = command(
        "app",
        exported["uint8"],
        {"folder": tmp_path / "space", "examples": betons / "val.beton", "count": 3},
    )
    assert status == 0, err
    assert "hf upload --type=space '<user>/space'" in out and "published with it: 3 ex" in out
    return tmp_path / "space"


def test_folder_is_a_space(app, exported, pictures):
    front = yaml.safe_load((app / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and (app / front["app_file"]).is_file()
    needed = (app / "requirements.txt").read_text().split()
    assert f"gradio=={front['sdk_version']}" in needed
    for name in ("config.json", "model.safetensors", "rsb_ffcv.json"):
        assert (app / "model" / name).read_bytes() == (exported["uint8"] / name).read_bytes()
    found = sorted(path.name for path in (app / "examples").iterdir())
    assert found == ["01_0.jpg", "02_4.jpg", "03_8.jpg"]  # the first, the middle and the last image
    for name, source in zip(found, ("amber/0.jpg", "blue/4.jpg", "cyan/8.jpg")):
        shown, stored = (
            np.asarray(Image.open(path)).astype(int)
            for path in (app / "examples" / name, pictures / "val" / source)
        )
        assert (
            shown.shape == stored.shape and np.abs(shown - stored).mean() < 12
        )  # noise, again JPEG


def test_examples_have_no_metadata(exported, command, tmp_path):
    """A photograph says where it was taken."""
    photo = Image.new("RGB", (3000, 20), "red")
    exif = photo.getexif()
    exif[0x0112], exif[0x013B] = 6, "somebody"
    photo.save(tmp_path / "photo, mine.jpg", exif=exif)
    status, _, err = command(
        "app",
        exported["uint8"],
        {"folder": tmp_path / "space", "examples": tmp_path / "photo, mine.jpg"},
    )
    assert status == 0, err
    (example,) = (tmp_path / "space" / "examples").iterdir()
    assert b"somebody" not in example.read_bytes() and not Image.open(example).getexif()
    assert Image.open(example).size == (7, 1024)  # upright, and not larger than a page needs


def test_examples_are_pictures(exported, command, pictures, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    for given, message in (
        (tmp_path / "text.jpg", f"{tmp_path}/text.jpg: not a readable picture"),
        (tmp_path / "none.jpg", f"{tmp_path}/none.jpg: no such picture"),
    ):
        status, _, err = command(
            "app", exported["uint8"], {"folder": tmp_path / "space", "examples": given}
        )
        assert status == 2 and err.startswith(f"error: {message}"), err
    assert not (tmp_path / "space").exists()
    given = f"{pictures}/val/blue,{pictures}/val/amber/1.jpg"
    status, _, err = command(
        "app", exported["uint8"], {"folder": tmp_path / "space", "examples": given, "count": 100}
    )
    assert status == 0 and len(list((tmp_path / "space" / "examples").iterdir())) == 10


@pytest.fixture(scope="session")
def gradio(tmp_path_factory):
    """A folder with Gradio, which requires another Pillow than the tested one."""
    from rsb_ffcv.commands.app import GRADIO

    folder = tmp_path_factory.mktemp("gradio")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", folder]
    done = subprocess.run([*pip, f"gradio=={GRADIO}"], capture_output=True, text=True)
    if not (folder / "gradio").is_dir():
        pytest.skip(f"Gradio cannot be installed: {done.stderr.strip()[-200:]}")
    return folder


class Client:
    """Talks to a running app as its page does. port: of the app."""

    def __init__(self, port):
        self.address = f"http://127.0.0.1:{port}"

    def send(self, path, data=None, kind="application/json"):
        request = urllib.request.Request(self.address + path, data, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def upload(self, name, data):
        mark = uuid.uuid4().hex
        head = (
            f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        )
        body = head.encode() + data + f"\r\n--{mark}--\r\n".encode()
        kind = f"multipart/form-data; boundary={mark}"
        return json.loads(self.send("/gradio_api/upload", body, kind))[0]

    def ask(self, path, name=""):
        """(event, data) for an uploaded picture, or None."""
        picture = path and {
            "path": path,
            "orig_name": name,
            "meta": {"_type": "gradio.FileData"},
        }
        call = "/gradio_api/call/predict"
        event = json.loads(self.send(call, json.dumps({"data": [picture]}).encode()))["event_id"]
        lines = self.send(f"{call}/{event}").splitlines()
        return lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))


@pytest.mark.long  # it installs Gradio
def test_app_answers_and_refuses_what_is_no_picture(app, gradio, exported, free_port, tmp_path):
    log = tmp_path / "log"
    paths = os.pathsep.join(filter(None, [str(gradio), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths, "GRADIO_SERVER_PORT": str(free_port)}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=app, env=env, stdout=file, stderr=subprocess.STDOUT
        )
    client = Client(free_port)

    try:
        wait_until(lambda: "Running on local URL" in log.read_text(), process)
        example = (app / "examples" / "02_4.jpg").read_bytes()
        model, about = formats.read_model(exported["uint8"])
        pixels = preprocess(Image.open(BytesIO(example)), **about.preprocessing())
        with torch.no_grad():
            logits = model(normalize(torch.from_numpy(pixels.copy())[None]))
        expected = dict(zip(about.classes, logits[0].softmax(0).tolist()))
        clear = BytesIO()
        Image.open(BytesIO(example)).convert("RGBA").save(clear, "PNG")
        for name, data in (("a.jpg", example), ("clear.png", clear.getvalue())):
            event, (label, duration) = client.ask(client.upload(name, data), name)
            assert event == "complete" and duration.endswith(" ms")
            found = {one["label"]: one["confidence"] for one in label["confidences"]}
            assert found == pytest.approx(expected, abs=1e-4)
            assert label["label"] == max(expected, key=expected.get)
        large, bomb, narrow = BytesIO(), BytesIO(), BytesIO()
        Image.new("1", (400_000, 1)).save(narrow, "PNG")
        Image.new("L", (8000, 8000)).save(large, "PNG")
        Image.new("1", (30000, 30000)).save(bomb, "PNG")
        for name, data, message in (
            ("text.jpg", b"hello", "This file is not a readable picture."),
            ("empty.jpg", b"", "This file is not a readable picture."),
            ("cut.jpg", example[:900], "This picture is damaged or not complete."),
            ("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "This file is none of "),
            ("large.png", large.getvalue(), "This picture has more than 50,000,000 pixels."),
            (
                "narrow.png",
                narrow.getvalue(),
                "This picture is more than 100 times as long as wide",
            ),
            ("bomb.png", bomb.getvalue(), "This file is not a readable picture."),
        ):
            event, answer = client.ask(client.upload(name, data), name)
            assert event == "error" and answer["error"].startswith(message), (name, answer)
        event, answer = client.ask(None)
        assert event == "error" and answer["error"] == "Choose a picture first."
        with pytest.raises(urllib.error.HTTPError, match="413"):
            client.upload("huge.jpg", example + bytes(21 << 20))
        assert "Traceback" not in log.read_text()
        event, _ = client.ask(str(Path(__file__)), "x.jpg")  # a file that nobody has uploaded
        assert event == "error"
        assert client.ask(client.upload("a.jpg", example), "a.jpg")[0] == "complete"
        page = client.send("/config")  # what the page is made of
        assert "resnet10t: 3 classes" in page
        assert all(name in page for name in ("01_0.jpg", "02_4.jpg", "03_8.jpg"))
    finally:
        process.kill()
        process.wait()
