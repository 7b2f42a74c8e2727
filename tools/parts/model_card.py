"""The README.md of an exported model: a card as model hubs read it, metadata first, for someone who has nothing else.

What it says of accuracy is what the run itself measured after its last step, or nothing; of the training, what its
configuration says. Paths of this machine are left out. The programs in it are run by tests/tools/test_export.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.backbone import hub_name, is_weight_file
from model.checkpoints import TENSORS
from model.methods import METHODS
from model.parameters import count_parameters
from model.video import VideoModel
from train.config import Config
from train.run_folder import RUN, Answers, read_answers, read_run
from train.trained import Trained

UNKNOWN_LICENCE = "unknown"
_SHOWN_CLASSES = 50
_TITLES = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class", "mean_average_precision": "mAP"}
_SETTINGS = {
    "model": ("method", "name", "pretrained"),
    "data": ("num_frames", "sampling", "interval", "crop_scale", "flip", "color_jitter", "rand_augment"),
    "optimizer": ("lr", "lr_scaling", "backbone_lr", "weight_decay"),
    "schedule": ("epochs", "warmup_epochs"),
    "train": ("label_smoothing", "seed"),
}
_PIPELINE = "video-classification"
_MULTI_LABEL = {
    "logits.softmax(-1)": "logits.sigmoid()",
    "np.exp(logits - logits.max())": "1 / (1 + np.exp(-logits))",
    "scores / scores.sum()": "scores",
}

_CLIP = """import av
import numpy as np
from PIL import ImageOps

with av.open("video.mp4") as video:
    upright = (frame.to_image().rotate(frame.rotation, expand=True) for frame in video.decode(video=0))
    frames = [np.asarray(ImageOps.fit(picture, ({size}, {size}), bleed={bleed:g})) for picture in upright]
{numbers}
np.save("clip.npy", np.stack([frames[number] for number in numbers]))
"""
_NUMBERS = {
    "uniform": """ends = np.round((len(frames) - 1) / {count} * np.arange({ends})).astype(int)
numbers = (ends[:-1] + ends[1:]) // 2""",
    "dense": """start = max(0, len(frames) - {span} + 1) // 2
numbers = (start + {interval} * np.arange({count})) % len(frames)""",
}
"""Frames of a video that make a clip, by data.sampling: as pipelines.plan.eval_frames."""
_IN_TORCH = """import json
import numpy as np
import torch

config = json.load(open("config.json", encoding="utf-8"))
model = torch.export.load("model.pt2").module()
clip = np.load("clip.npy")  # {clip}
with torch.inference_mode():
    logits = model(torch.from_numpy(clip[None]))[0]
probabilities = logits.softmax(-1)
for number in probabilities.argsort(descending=True)[:5].tolist():
    print(f"{{probabilities[number]:.1%}} {{config['classes'][number]}}")
"""
_IN_ONNX = """import json
import numpy as np
import onnxruntime

config = json.load(open("config.json", encoding="utf-8"))
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
clip = np.load("clip.npy")  # {clip}
logits = session.run(["logits"], {{"frames": clip[None]}})[0][0]
scores = np.exp(logits - logits.max())
probabilities = scores / scores.sum()
for number in np.argsort(-probabilities)[:5]:
    print(f"{{probabilities[number]:.1%}} {{config['classes'][number]}}")
"""
_IN_OURS = """import json
import numpy as np
import torch
import model  # of the project that wrote this: PYTHONPATH=/path/to/image-to-video python …

config = json.load(open("config.json", encoding="utf-8"))
network = model.load({place})
clip = np.load("clip.npy")  # {clip}
with torch.inference_mode():
    logits = network(torch.from_numpy(clip[None]))[0]
probabilities = logits.softmax(-1)
for number in probabilities.argsort(descending=True)[:5].tolist():
    print(f"{{probabilities[number]:.1%}} {{config['classes'][number]}}")
"""
_IN_OURS_WITHOUT_NAMES = """import numpy as np
import torch
import model  # of the project that wrote this: PYTHONPATH=/path/to/image-to-video python …

network = model.load({place})
clip = np.load("clip.npy")  # {clip}
with torch.inference_mode():
    print(network(torch.from_numpy(clip[None])).shape)
"""


def model_card(
    name: str,
    model: VideoModel,
    document: Mapping[str, Any],
    *,
    config: Config | None,
    answers: Answers | None,
    licence: str = UNKNOWN_LICENCE,
) -> str:
    """The text. `model` is what is written, `document` its config.json; `config` that of the run, None where it is not
    known; `answers` what the run measured of these very weights."""
    parts = [
        _metadata(document, config, licence),
        [f"# {plain(name)}", "", *_what(model, document, config)],
        ["## Use", "", *_use(model, document, config, answers is not None and answers.evaluation.multi_label)],
        ["## Input", "", *_input(model, document, config)],
        ["## Classes", "", *_classes(document)],
        ["## Measured", "", *_measured(document, config, answers)],
        ["## Training", "", *_training(document, config)],
        ["## Licence and citation", "", *_rights(document, config, licence)],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def own_answers(trained: Trained) -> Answers | None:
    """What a run measured of exactly these weights; None where it did not. ValueError: its files are damaged."""
    if trained.step is None or not (trained.folder / RUN).is_file():
        return None
    ends = [line["step"] for line in read_run(trained.folder).of_kind("end")]
    return read_answers(trained.folder) if ends[-1:] == [trained.step] else None


def without_folder(pretrained: str) -> str:
    """`model.pretrained`: a tag, or a file's name without its folder."""
    return Path(pretrained).name if is_weight_file(pretrained) else pretrained


def _metadata(document: Mapping[str, Any], config: Config | None, licence: str) -> list[str]:
    """YAML, in which any text of JSON is a text."""
    base = None if config is None else hub_name(config.model.name, config.model.pretrained)
    entries = {"license": licence, "pipeline_tag": _PIPELINE, "library_name": "image-to-video"}
    entries |= {} if base is None else {"base_model": base}
    onnx = ["onnx"] if "model.onnx" in document.get("graphs", ()) else []
    tags = [_PIPELINE, "action-recognition", _method(document, config), *onnx]
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items()]
    return ["---", *lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"]


def _what(model: VideoModel, document: Mapping[str, Any], config: Config | None) -> list[str]:
    method, size = _method(document, config), model.geometry.image_size
    total, trainable = count_parameters(model)
    count = "no classifier" if model.num_classes is None else f"{model.num_classes} classes"
    lines = [
        f"A video model, {method} ({METHODS[method].summary}): {model.num_frames} frames of {size} × {size} pixels, "
        f"{count}, {total:,} parameters" + (f", of which {trainable:,} trained." if 0 < trainable < total else ".")
    ]
    if config is None and document["source"] == "run":
        lines.append("It was exported anew from a folder that does not name its image model.")
    elif config is None:
        lines.append(f"It was converted from a published checkpoint (format {document['source']}).")
    else:
        weights = without_folder(config.model.pretrained)
        lines.append(f"It stands on the image model {plain(config.model.name)} with the weights {plain(weights)}.")
    if method != document["model"]["method"]:
        lines.append("What it learned is merged into the image model's weights.")
    if "backbone" in document:
        lines.append(
            f"{TENSORS} holds what training changed and no more: the image model's weights are fetched by their tag, "
            "or read from a file that you name, and compared with the checksum in config.json."
        )
    return lines


def _use(model: VideoModel, document: Mapping[str, Any], config: Config | None, multi_label: bool) -> list[str]:
    graphs, size = document.get("graphs", {}), model.geometry.image_size
    clip = f"uint8 [{model.num_frames}, {size}, {size}, 3]: frames, height, width, RGB"
    from_file = is_weight_file(document.get("backbone", {}).get("pretrained", ""))
    lines: list[str] = []
    if "tensors_sha256" in document:
        more = " --set model.pretrained=PATH" if from_file else ""
        more += "" if "classes" in document else " --classes A,B"
        command = f"python tools/predict.py FOLDER VIDEO{more}"
        lines += [f"In the project that wrote it, `{command}` says what a video shows.", ""]
    lines += ["A clip is cut from a video with `av`, `numpy` and `pillow`:", "", *_cut(model, document, config)]
    if "model.onnx" in graphs:
        lines += ["With `onnxruntime` and `numpy`:", "", *_program(_IN_ONNX, clip, multi_label)]
    if "model.pt2" in graphs:
        version = graphs["model.pt2"]["torch"].partition("+")[0]
        lines += [
            f"With `torch` (this file was written by PyTorch {version}) and `numpy`:",
            "",
            *_program(_IN_TORCH, clip, multi_label),
            "PyTorch's loader runs what a `.pt2` file marks as pickled. This one has nothing so marked; make sure that "
            "it is the file whose SHA-256 config.json gives, and load none of a stranger's.",
            "",
        ]
    if "tensors_sha256" in document:
        place = '".", pretrained="PATH"' if from_file else '"."'
        text = _IN_OURS if "classes" in document else _IN_OURS_WITHOUT_NAMES
        program = _program(text, clip, multi_label, place=place)
        lines += ["With the project that wrote it, of such a clip:", "", *program]
    return lines[:-1]


def _cut(model: VideoModel, document: Mapping[str, Any], config: Config | None) -> list[str]:
    """The program that makes clip.npy, as `_input` says it; evenly spread where it is not known how."""
    count, sampling, interval = model.num_frames, document.get("sampling"), document.get("interval") or 1
    rule = _NUMBERS["dense" if sampling == "dense" else "uniform"]
    numbers = rule.format(count=count, ends=count + 1, interval=interval, span=count * interval)
    bleed = 0.0 if config is None else (1 - config.data.eval_crop) / 2
    text = _CLIP.format(size=model.geometry.image_size, bleed=bleed, numbers=numbers)
    return ["```python", *text.splitlines(), "```", ""]


def _program(text: str, clip: str, multi_label: bool, **more: str) -> list[str]:
    for single, several in _MULTI_LABEL.items() if multi_label else ():
        text = text.replace(single, several)
    return ["```python", *text.format(clip=clip, **more).splitlines(), "```", ""]


def _input(model: VideoModel, document: Mapping[str, Any], config: Config | None) -> list[str]:
    """How clips are cut for one view, as in evaluations during training."""
    geometry, frames, size = model.geometry, model.num_frames, model.geometry.image_size
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (geometry.mean, geometry.std))
    lines = [
        f"- Clips of {frames} RGB frames, uint8; any number of clips at once. Normalisation is part of the model: mean "
        f"({mean}), standard deviation ({std}) of values in 0..1."
    ]
    sampling, interval = document.get("sampling"), document.get("interval")
    if sampling == "uniform":
        lines.append(f"- Frames: the middle one of each of {frames} equal parts of the video.")
    elif sampling == "dense":
        lines.append(f"- Frames: {frames} of them, every {interval}th, from the middle of the video.")
    else:
        lines.append("- How frames were chosen in training is not known.")
    if config is not None:
        share = config.data.eval_crop
        lines.append(f"- Picture: the square in the middle, {share:g} of the short side, scaled to {size} × {size}.")
    return lines


def _classes(document: Mapping[str, Any]) -> list[str]:
    names: Sequence[str] = document.get("classes", ())
    count = document["model"]["num_classes"]
    if not names:
        return [f"{count} classes, whose names are not known." if count is not None else "None."]
    shown = ", ".join(_code(name) for name in names[:_SHOWN_CLASSES])
    more = len(names) - _SHOWN_CLASSES
    end = f" and {more} more, in config.json." if more > 0 else "."
    return [f"{len(names)}, in the order of their numbers: {shown}{end}"]


def _measured(document: Mapping[str, Any], config: Config | None, answers: Answers | None) -> list[str]:
    lines = []
    if answers is None or config is None:
        lines.append("- Accuracy: the run measured none of exactly these weights.")
    else:
        data, values = config.data, answers.evaluation.metrics()
        shares = ", ".join(f"{title} {values[key]:.2%}" for key, title in _TITLES.items() if key in values)
        undecodable = f", {values['undecodable']:.0f} more could not be decoded" if values["undecodable"] else ""
        lines.append(
            f"- By the run itself after its last step, on the split {_code(data.val_split)} of the set "
            f"{_code(Path(data.shards).name)}: {shares}; {values['samples']:.0f} videos, clips × crops of each: "
            f"{data.test_clips} × {data.test_crops}{undecodable}."
        )
    for file, said in document.get("graphs", {}).items():
        lines.append(
            f"- {file}: logits of clips of noise, 1, 2 and 5 at once on a CPU, differ from the model's by at most "
            f"{said['largest_error']:.1g} of the largest."
        )
    return lines


def _training(document: Mapping[str, Any], config: Config | None) -> list[str]:
    if config is None:
        return ["Its settings are not known here."]
    if not METHODS[config.model.method].trains:
        return ["None: the image model as it is."]
    rows = [f"| {_code(key)} | {_code(json.dumps(value))} |" for key, value in _settings(config).items()]
    return ["| setting | value |", "|---|---|", *rows]


def _settings(config: Config) -> dict[str, Any]:
    """What a reader asks for first; config.json has the model's own."""
    document = config.as_dict()
    document["model"]["pretrained"] = without_folder(config.model.pretrained)
    settings = {f"{section}.{key}": document[section][key] for section, keys in _SETTINGS.items() for key in keys}
    return settings | {"ds.train_batch_size": document["deepspeed"]["train_batch_size"], "bf16": config.bf16}


def _rights(document: Mapping[str, Any], config: Config | None, licence: str) -> list[str]:
    stated = "Who exported it stated no licence." if licence == UNKNOWN_LICENCE else f"Licence: {plain(licence)}."
    paper = METHODS[_method(document, config)].paper
    also = " The image model's weights and the videos have licences of their own."
    return [stated + also, *(["", f"The method: {paper}."] if paper else [])]


def _method(document: Mapping[str, Any], config: Config | None) -> str:
    """By which it was trained; merged it may be another's model."""
    return str(document["model"]["method"] if config is None else config.model.method)


def plain(text: str) -> str:
    """On one line, without what Markdown or HTML would take for its own."""
    return "".join(letter for letter in " ".join(text.split()) if letter not in "`*<>[]|\\")


def _code(text: str) -> str:
    """As it is, in a cell of a table too."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "/") + "`"
