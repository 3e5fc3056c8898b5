"""The formats of an exported model. Each function writes into one folder, or reads from it.

- timm: `model.safetensors`, with the names of timm's model, and `config.json`, which
  `timm.create_model("local-dir:<folder>")` and the Hugging Face Hub read.
- torch: `model.pt2`, a `torch.export` program. onnx: `model.onnx`. Both contain the normalization,
  take any number of images, and are compared with the model before they are kept.

The input of the two programs is uint8 (n, side, side, 3), as the loaders and `preprocess` make it,
or float32 (n, 3, side, side) in 0 .. 1, as torchvision's ToTensor makes it. Their output is
`logits`, float32 (n, classes).
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from rsb_ffcv import InputError, first_line
from rsb_ffcv.export.description import NAME, Description, read_description
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.learning.weights import load_weights
from rsb_ffcv.loading.batch import scale_and_shift

WEIGHTS, CONFIG, TORCH, ONNX = "model.safetensors", "config.json", "model.pt2", "model.onnx"
INPUTS = ("uint8", "float")
# Entries of timm's configuration that describe the weights that timm publishes for an architecture
OTHER_WEIGHTS = (
    *("tag", "origin_url", "paper_ids", "paper_name", "notes"),
    *("test_input_size", "test_crop_pct", "test_pool_size", "pool_size"),
)
TOLERANCE = 1e-4  # of logits, between onnxruntime and torch
MISSING = "`formats`=onnx: needs the package {0}; install it: pip install {0}"


class Normalized(nn.Module):
    """A model with the normalization of its input. kind: one of INPUTS."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: nn.Module, about: Description, kind: str) -> None:
        super().__init__()
        self.model, self.kind, self.side = model, kind, about.side
        scale, shift = scale_and_shift(tuple(about.mean), tuple(about.std), torch.device("cpu"))
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.kind == "float":
            images = 255 * images.permute(0, 2, 3, 1)
        # as loading.batch.normalize, whose constants are cached: an exporter must not trace them
        return self.model((images * self.scale + self.shift).permute(0, 3, 1, 2))

    def example(self, count: int) -> torch.Tensor:
        """Inputs of the right type and shape: noise from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (count, self.side, self.side, 3), generator=generator)
        if self.kind == "uint8":
            return pixels.to(torch.uint8)
        return pixels.permute(0, 3, 1, 2).contiguous() / 255


def write_weights(model: nn.Module, folder: Path) -> None:
    """Writes `model.safetensors`."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    # save_file would make it readable for this user only
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights, {"format": "pt"}))


def read_model(folder: Path) -> tuple[Any, Description]:
    """The model of an exported folder, on the CPU in eval mode, and its description. Raises
    InputError if the folder has none."""
    about = read_description(folder)
    model = build_model(about.arch, len(about.classes), blurpool=about.blurpool)
    try:
        load_weights(model, folder / WEIGHTS)
    except InputError as error:
        raise InputError(
            f"`model`={folder}: {WEIGHTS} is missing, damaged or of another model; export it again"
        ) from error
    return model.eval(), about


def write_timm(model: nn.Module, about: Description, folder: Path, *, license: str) -> None:
    """Writes `config.json` with timm's own function. license: of the weights. Raises InputError for
    a model that timm cannot build."""
    if about.blurpool:
        raise InputError(
            "`formats`=timm: timm cannot build a model with training.use_blurpool=1; use torch or "
            "onnx"
        )
    titles = dict(zip(about.classes, about.titles))
    timm.models._hub.save_config_for_hf(
        model,
        folder / CONFIG,  # type: ignore[arg-type]  # earlier versions of timm need a Path
        model_config={"label_names": about.classes}
        | ({"label_descriptions": titles} if titles else {}),
    )
    # The function has an argument for the preprocessing since timm 1.0.31 only.
    made = json.loads((folder / CONFIG).read_text())
    published = made["pretrained_cfg"]
    for name in OTHER_WEIGHTS:
        published.pop(name, None)
    published |= {
        "input_size": (3, about.side, about.side),
        "interpolation": about.interpolation,
        "crop_pct": about.crop_ratio,
        "crop_mode": "center",
        "mean": about.mean,
        "std": about.std,
    }
    published["license"] = license
    (folder / CONFIG).write_text(json.dumps(made, indent=2) + "\n")


def write_torch(model: nn.Module, about: Description, folder: Path, *, kind: str) -> None:
    """Writes `model.pt2`, with the preprocessing and the classes as its extra file
    `rsb_ffcv.json`."""
    wrapped = Normalized(model, about, kind).eval()
    with _quiet():
        program = torch.export.export(
            wrapped, (wrapped.example(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        for node in program.graph.nodes:  # it names files and folders of this machine
            node.meta.pop("stack_trace", None)
        extra = {NAME: json.dumps(_metadata(about, kind))}
        torch.export.save(program, folder / TORCH, extra_files=extra)
        _compare(wrapped, folder / TORCH, tolerance=0)


def write_onnx(model: nn.Module, about: Description, folder: Path, *, kind: str) -> None:
    """Writes `model.onnx`, with the preprocessing and the classes as metadata properties (JSON).
    Raises InputError if a package is missing, or if onnxruntime's logits differ from torch's by
    more than TOLERANCE."""
    try:
        import onnx
        import onnxscript  # noqa: F401 torch's exporter needs it
    except ImportError as error:
        raise InputError(MISSING.format(error.name)) from error
    wrapped = Normalized(model, about, kind).eval()
    with _quiet():
        program = torch.onnx.export(
            wrapped,
            (wrapped.example(2),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # what `dynamo` returns
        program.save(str(folder / ONNX), external_data=False)
    made = onnx.load(folder / ONNX)
    for node in made.graph.node:  # the exporter's notes name files and folders of this machine
        del node.metadata_props[:]
    onnx.helper.set_model_props(
        made, {name: json.dumps(value) for name, value in _metadata(about, kind).items()}
    )
    onnx.save(made, folder / ONNX)
    _compare(wrapped, folder / ONNX, tolerance=TOLERANCE)


def _metadata(about: Description, kind: str) -> dict[str, Any]:
    return about.preprocessing() | {"input": kind, "classes": about.classes}


@dataclass(frozen=True, kw_only=True)
class Program:
    """An exported program.

    run: images -> logits. An ONNX program runs on the CPU.
    kind: of its input, one of INPUTS.
    side: of its images, in pixels.
    classes: names in the order of the outputs.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    kind: str
    side: int
    classes: list[str]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (n, side, side, 3) -> the program's input."""
        return images if self.kind == "uint8" else images.permute(0, 3, 1, 2) / 255


def read_program(path: Path, device: torch.device) -> Program:
    """Reads a program that `write_torch` or `write_onnx` wrote. device: where a torch program runs.
    Raises InputError if it cannot be read, or if a package is missing."""
    try:
        run, known = _read_torch(path, device) if path.suffix == ".pt2" else _read_onnx(path)
        return Program(run=run, kind=known["input"], side=known["side"], classes=known["classes"])
    except InputError:
        raise
    # Both readers raise nearly any exception for a damaged file
    except Exception as error:
        raise InputError(
            f"`path`={path}: not a program of `train_imagenet.py export` ({first_line(error)}); "
            f"export it again"
        ) from error


def _read_torch(path: Path, device: torch.device) -> tuple[Callable[..., Any], dict[str, Any]]:
    extra = {NAME: ""}
    with _quiet():
        program = torch.export.load(path, extra_files=extra).module()
    return program.to(device), json.loads(extra[NAME])


def _read_onnx(path: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(MISSING.format(error.name)) from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"images": images.cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)

    known = session.get_modelmeta().custom_metadata_map
    return run, {name: json.loads(value) for name, value in known.items()}


@torch.no_grad()
def _compare(wrapped: Normalized, path: Path, *, tolerance: float) -> None:
    """Raises InputError if the logits of the program at `path` differ from the model's by more than
    `tolerance`, for one image or for several."""
    program = read_program(path, torch.device("cpu"))
    for count in (1, 3):
        images = wrapped.example(count)
        worst = float((program.run(images) - wrapped(images)).abs().max())
        if not worst <= tolerance:  # also if it is not a number
            raise InputError(
                f"`formats`: the logits of {path.name} differ by {worst:.2g} from the model's, "
                f"more than {tolerance:g}; use another format, and report it"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress and deprecation messages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
