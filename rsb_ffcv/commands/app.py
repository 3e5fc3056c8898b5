"""Writes a Gradio app for an exported model: a folder that runs as it is, also as a Space of the
Hugging Face Hub."""

import json
import os
import shlex
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import timm
from PIL import Image

from rsb_ffcv import InputError, counted, export, option_names, preprocessing
from rsb_ffcv.atomic import atomic_folder
from rsb_ffcv.beton import Beton
from rsb_ffcv.commands import only_folder
from rsb_ffcv.commands.predict import sources
from rsb_ffcv.config.train import AppOptions
from rsb_ffcv.dataset.picture import load_rgb
from rsb_ffcv.export.description import NAME, Description, read_description
from rsb_ffcv.export.formats import CONFIG, WEIGHTS

GRADIO = "6.31.0"  # that the app was tested with
SIDE = 1024  # longest side of an example, in pixels
FIX = "give a folder that `train_imagenet.py export` wrote, with export.formats=timm"


def write_app(models: list[str], options: AppOptions) -> None:
    """Writes the app of an exported model to the new folder `options.folder`, and prints how to
    start it. models: the folder of the model, alone.

    Raises InputError if the model or an example cannot be read, or if the folder cannot be written.
    """
    model, folder = only_folder("app", models, FIX), Path(options.folder)
    with option_names({"model": "app"}):
        about = read_description(model)
    for name in (CONFIG, WEIGHTS):
        if not (model / name).is_file():
            raise InputError(f"{model}: has no {name}; {FIX}")
    examples = _examples(options)
    with atomic_folder(folder, "give a new app.folder") as unfinished:
        shutil.copy(Path(export.__file__).with_name("app.py"), unfinished)
        shutil.copy(preprocessing.__file__, unfinished)
        (unfinished / "model").mkdir()
        for name in (CONFIG, WEIGHTS, NAME):
            shutil.copy(model / name, unfinished / "model")
        if examples:
            (unfinished / "examples").mkdir()
        for name, data in examples:
            (unfinished / "examples" / name).write_bytes(data)
        needed = f"gradio=={GRADIO}\ntorch\ntimm>={timm.__version__}\n"
        (unfinished / "requirements.txt").write_text(needed)
        (unfinished / "README.md").write_text(_card(about, folder), encoding="utf-8")
    name = folder.resolve().name
    quoted = shlex.quote(str(folder))
    print(f"{folder}: start it with: cd {quoted}; pip install -r requirements.txt; python app.py")
    print(f"upload: hf upload --type=space {shlex.quote(f'<user>/{name}')} {quoted} .")
    if examples:
        print(f"published with it: {counted(len(examples), 'example')}")


def _card(about: Description, folder: Path) -> str:
    """The Space's README.md."""
    lines = ["---", f"title: {json.dumps(folder.resolve().name)}", "sdk: gradio"]
    lines += [f"sdk_version: {GRADIO}", "app_file: app.py", "---", ""]
    return "\n".join([*lines, f"{about.arch} for {len(about.classes):,} classes.", ""])


def _examples(options: AppOptions) -> list[tuple[str, bytes]]:
    """Name and content of each example, at most options.count, spread over the given pictures. They
    are JPEGs without metadata, which may have a place or a name."""
    text = options.examples
    given = [text] if os.path.exists(text) else [part for part in text.split(",") if part.strip()]
    found: list[tuple[str, bytes]] = []
    each = [(source, index) for source in sources(given) for index in range(len(source))]
    chosen = np.unique(np.linspace(0, len(each) - 1, min(options.count, len(each))).astype(int))
    for number in chosen.tolist():
        source, index = each[number]
        if isinstance(source, Beton):
            name = source.names_of([index])[index]
            with source.open() as opened:
                pixels = source.picture(opened, index)
        else:
            name = str(source[index])
            pixels = _pixels(source[index])
        picture, jpeg = Image.fromarray(pixels), BytesIO()
        picture.thumbnail((SIDE, SIDE))
        picture.save(jpeg, "JPEG", quality=95)
        found.append((f"{len(found) + 1:02d}_{Path(name).stem}.jpg", jpeg.getvalue()))
    return found


def _pixels(path: Path) -> np.ndarray:
    try:
        return load_rgb(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(
            f"app.examples: {path} cannot be read ({error.strerror}); leave it out"
        ) from error
