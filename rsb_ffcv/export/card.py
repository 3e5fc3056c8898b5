"""The model card of an exported folder, README.md, as the Hugging Face Hub shows it.

Everything in it was measured by the run, or is an option of it. What the program cannot know, such
as the license of the images, it says that it does not know.
"""

import json

import yaml

from rsb_ffcv import counted
from rsb_ffcv.export.description import Description
from rsb_ffcv.export.formats import ONNX, TORCH

SECTIONS = ("model", "resolution", "augment", "mix", "lr", "training", "ema", "swa")  # of a recipe
METRICS = {
    "top1": "top-1, %",
    "top5": "top-5, %",
    "val_loss": "cross-entropy",
    "relabelled_top1": "top-1 with the second set of labels, %",
}
WEIGHTS = {
    "raw": "The weights are those of the optimizer.",
    "EMA": "The weights are an exponential moving average over the training steps.",
    "SWA": "The weights are a stochastic weight average of the last epochs.",
}


def card(
    about: Description, *, license: str, repository: str, formats: list[str], kind: str
) -> str:
    """The text of the card.

    license: of the weights, an identifier of the Hub.
    repository: <user>/<name> on the Hub.
    formats: of the folder: "timm", "torch", "onnx".
    kind: input of the programs, see formats.INPUTS.
    """
    title = repository.rpartition("/")[2]
    what = (
        f"{about.arch} for {len(about.classes):,} classes at {about.side} px, trained with "
        f"rsb_ffcv {about.software.get('rsb_ffcv')}. {WEIGHTS.get(about.weights, '')}"
    )
    lines = [*_front(about, license, formats), f"# {title}", "", what.strip(), ""]
    lines += [*_results(about), *_use(about, repository, formats, kind=kind)]
    lines += [*_training(about), *_limits(about)]
    return "\n".join(lines) + "\n"


def _front(about: Description, license: str, formats: list[str]) -> list[str]:
    """The Hub's metadata. Values are written as JSON, which is YAML."""
    library = ["library_name: timm"] if "timm" in formats else []
    lines = ["---", *library, "pipeline_tag: image-classification"]
    lines += [f"license: {json.dumps(license)}", "tags:", "- image-classification"]
    lines += ["- timm"] if "timm" in formats else []
    return [*lines, "---", ""]


def _results(about: Description) -> list[str]:
    if not about.metrics:
        return ["## Results", "", "The run did not measure the accuracy of these weights.", ""]
    rows = [
        f"| {METRICS[name]} | {value:.{4 if name == 'val_loss' else 2}f} |"
        for name, value in about.metrics.items()
    ]
    known = about.evaluation
    flips = "; logits are averaged with those of the mirrored picture" if known["lr_tta"] else ""
    where = (
        f" on {known['images']:,} images (fingerprint of the file: `{known['fingerprint']}`)"
        if "images" in known
        else ""
    )
    precision = f", computed in {known['precision']}" if "precision" in known else ""
    return [
        "## Results",
        "",
        "| metric | value |",
        "|---|---|",
        *rows,
        "",
        f"Measured by the run after epoch {known['epoch']}{where} at {about.side} px: the shorter "
        f"side is resized to {int(about.side / about.crop_ratio)} px ({about.interpolation}), and "
        f"the central square is taken{flips}{precision}.",
        "",
    ]


def _use(about: Description, repository: str, formats: list[str], *, kind: str) -> list[str]:
    lines = ["## Use", ""]
    if "timm" in formats:
        lines += [
            "```python",
            "import timm",
            "from PIL import Image",
            "",
            f'model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()',
            "data = timm.data.resolve_model_data_config(model)",
            "transform = timm.data.create_transform(**data, is_training=False)",
            'logits = model(transform(Image.open("picture.jpg").convert("RGB"))[None])',
            "```",
            "",
        ]
    arguments = ", ".join(f"{name}={value!r}" for name, value in about.preprocessing().items())
    pixels = [
        "from PIL import Image",
        "from preprocessing import preprocess  # a file of this folder",
        "",
        'picture = Image.open("picture.jpg")',
        f"pixels = preprocess(picture, {arguments})",
    ]
    if "torch" in formats:
        images = "torch.from_numpy(pixels.copy())[None]"
        if kind == "float":
            images = "torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255"
        lines += ["```python", "import torch", *pixels, f"images = {images}"]
        lines += [f'logits = torch.export.load("{TORCH}").module()(images)', "```", ""]
    if "onnx" in formats:
        images = "pixels[None]"
        if kind == "float":
            images = "pixels.transpose(2, 0, 1)[None].astype(numpy.float32) / 255"
            pixels.insert(0, "import numpy")
        lines += ["```python", "import onnxruntime", *pixels]
        lines += [f'session = onnxruntime.InferenceSession("{ONNX}")']
        lines += [f'(logits,) = session.run(None, {{"images": {images}}})', "```", ""]
    return lines


def _training(about: Description) -> list[str]:
    lines = ["## Training", ""]
    if about.data:
        lines += [
            f"{about.data['images']:,} images in {about.data['classes']:,} classes (fingerprint of "
            f"the file: `{about.data['fingerprint']}`).",
            "",
        ]
    if about.lineage:
        lines += ["The run continues others:", ""]
        for step in about.lineage:
            changed = [f"{name} {old} -> {new}" for name, (old, new) in step["changed"].items()]
            lines.append(
                f"- `{step['checkpoint']}`, after {counted(step['epochs'], 'epoch')}; changed: "
                f"{', '.join(changed) or 'nothing'}"
            )
        lines.append("")
    lines += ["<details><summary>Recipe</summary>", "", "```yaml"]
    recipe = {name: about.recipe[name] for name in SECTIONS if name in about.recipe}
    lines += yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).splitlines()
    software = ", ".join(f"{name} {version}" for name, version in about.software.items() if version)
    return [*lines, "```", "", "</details>", "", f"Software: {software}.", ""]


def _limits(about: Description) -> list[str]:
    return [
        "## Intended use and limits",
        "",
        f"The model assigns one of its {len(about.classes):,} classes to a picture, also to a "
        f"picture that shows none of them; its probabilities are not calibrated. Its accuracy is "
        f"known for the file above only. On pictures of another kind it can be much lower. It was "
        f"not examined for differences of accuracy between groups of people, and is not meant for "
        f"decisions about people. The licenses of the training images apply; this card does not "
        f"list them.",
    ]
