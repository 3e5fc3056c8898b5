"""A page that classifies a picture. Start: pip install -r requirements.txt; python app.py"""

import json
import time
from pathlib import Path
from typing import Any

import gradio as gr
import timm
import torch
from PIL import Image
from preprocessing import FORMATS, MAX_ASPECT, preprocess  # of this folder

HERE = Path(__file__).parent
ABOUT = json.loads((HERE / "model" / "rsb_ffcv.json").read_text(encoding="utf-8"))
NAMES = ABOUT["titles"] or ABOUT["classes"]
MAX_PIXELS = 50_000_000
TOP = 5

model = timm.create_model(f"local-dir:{HERE / 'model'}", pretrained=True).eval()
mean, std = (torch.tensor(ABOUT[name])[:, None, None] for name in ("mean", "std"))


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # of Pillow


class Refused(gr.Error):
    """Shows `message` on the page, without a traceback in the log."""

    def __init__(self, message: str) -> None:
        super().__init__(message, print_exception=False)


class Picture(gr.Image):
    """Gradio's image input, with a message for files that it cannot open."""

    is_template = True  # the page shows it as its base class

    def preprocess(self, payload: Any) -> Any:
        try:
            return super().preprocess(payload)
        except UNREADABLE as error:
            raise Refused("This file is not a readable picture.") from error


def classify(path: str | None) -> tuple[dict[str, float], str]:
    """The probabilities of the best classes, and the duration, of the picture at `path`."""
    if path is None:
        raise Refused("Choose a picture first.")
    started = time.perf_counter()
    try:
        picture = Image.open(path, formats=FORMATS)
    except UNREADABLE as error:
        raise Refused(f"This file is none of {', '.join(FORMATS)}.") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise Refused(f"This picture has more than {MAX_PIXELS:,} pixels.")
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        raise Refused(f"This picture is more than {MAX_ASPECT} times as long as wide.")
    try:
        pixels = preprocess(
            picture,
            side=ABOUT["side"],
            crop_ratio=ABOUT["crop_ratio"],
            interpolation=ABOUT["interpolation"],
        )
    except UNREADABLE as error:
        raise Refused("This picture is damaged or not complete.") from error
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    with torch.no_grad():
        scores = model(((image - mean) / std)[None])[0].softmax(0)
    best = scores.topk(min(TOP, len(NAMES)))
    found = {
        f"{NAMES[label]} ({label})" if NAMES.count(NAMES[label]) > 1 else NAMES[label]: score
        for label, score in zip(best.indices.tolist(), best.values.tolist())
    }
    return found, f"{1000 * (time.perf_counter() - started):.0f} ms"


examples = sorted(map(str, (HERE / "examples").glob("*")))
page = gr.Interface(
    classify,
    Picture(type="filepath", image_mode=None, label="Picture", sources=["upload", "clipboard"]),
    [gr.Label(num_top_classes=TOP, label="Classes"), gr.Textbox(label="Time")],
    examples=examples or None,
    cache_examples=False,
    title=f"{ABOUT['arch']}: {len(NAMES):,} classes",
    description=(
        f"top-1 {ABOUT['metrics']['top1']:.2f} % on {ABOUT['evaluation'].get('images', '?')} images"
        if "top1" in ABOUT["metrics"]
        else None
    ),
    flagging_mode="never",
    analytics_enabled=False,
    delete_cache=(3600, 3600),  # uploads, after an hour
    api_name="predict",
)

if __name__ == "__main__":
    page.launch(max_file_size="20mb")
