"""An exported model through the program: it answers as the trained one did, to the last bit where nothing is merged;
the card's own programs run where nothing of ours can be imported; what is wrong is said before anything is written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import model
from model.checkpoints import convert, read_folder, write_folder
from model.methods import build, describe
from model.methods.zero_i2v import ZeroI2V
from model.open_clip_models import TINY_CLIP_FOLDER
from model.video import VideoModel
from pipelines.plan import ClipOptions, eval_box, eval_frames
from tests import official_files
from tests.official_files import saved
from tests.shell import call_program, shell_environment
from tests.tools.test_convert_checkpoint import make_run
from tests.videos import read_number, write_video
from tools.export import main
from tools.parts.model_card import model_card
from train.evaluate import Evaluation
from train.resolve import config_from_dict
from train.run_folder import Answers
from train.trained import open_trained

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
BATCH = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
PARTS = ("Use", "Input", "Classes", "Measured", "Training", "Licence and citation")
CLIP_SHAPE = (1, 4, 3, 48, 48)


def logits(network: nn.Module, shape: tuple[int, ...] = CLIP_SHAPE) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = network(torch.randn(shape, generator=torch.Generator().manual_seed(5)))
    return answer


def test_a_run_is_merged_and_keeps_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = make_run(tmp_path / "run", method="zero_i2v")
    main([str(tmp_path / "run"), str(tmp_path / "out")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("merged: ") and said[-1].startswith(f"{tmp_path / 'out'}: written; open it with")
    merged = model.load(tmp_path / "out")
    expected = logits(trained)
    assert not any("Adapter" in name for name, _ in merged.named_parameters())
    assert (logits(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = open_trained(tmp_path / "out")
    assert again.classes == ("a", "b", "c")
    assert (again.config.data.sampling, again.config.data.interval, again.assumed) == ("uniform", 3, "")


def test_a_converted_checkpoint_is_merged_with_its_settings(tmp_path: Path) -> None:
    write_folder(convert(saved(official_files.zero_i2v(), tmp_path / "a.safetensors")), tmp_path / "a")
    main([str(tmp_path / "a"), str(tmp_path / "out"), "--set", "model.adapter_scale=1.0"])
    shape = (1, 4, 3, 32, 32)
    expected = logits(model.load(tmp_path / "a", scale=1), shape)
    assert (logits(model.load(tmp_path / "out"), shape) - expected).abs().max() <= 1e-5 * expected.abs().max()
    stored = read_folder(tmp_path / "out")
    assert (stored.source, stored.classes, stored.sampling) == ("zero_i2v", None, None)


def test_a_model_with_nothing_to_merge_is_written_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(convert(saved(official_files.aim_clip(), tmp_path / "a.safetensors")), tmp_path / "a")
    main([str(tmp_path / "a"), str(tmp_path / "out")])
    assert capsys.readouterr().out.startswith("nothing to merge")
    first, second = read_folder(tmp_path / "a"), read_folder(tmp_path / "out")
    assert first.description == second.description
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "published checkpoint (format aim_clip)" in card and "5 classes, whose names are not known" in card
    assert "VIDEO --classes A,B`" in card
    compile(programs(tmp_path / "out")[1], "README.md", "exec")
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    with pytest.raises(ValueError, match="is there already"):
        main([str(tmp_path / "a"), str(tmp_path / "out")])


def test_a_merged_model_that_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(convert(saved(official_files.zero_i2v(), tmp_path / "a.safetensors")), tmp_path / "a")
    merge = ZeroI2V.merged

    def wrong(network: ZeroI2V) -> Any:
        merged = merge(network)
        nn.init.zeros_(next(iter(merged.parameters())))
        return merged

    monkeypatch.setattr(ZeroI2V, "merged", wrong)
    with pytest.raises(ValueError, match=r"is off by .* of the largest logit, allowed is"):
        main([str(tmp_path / "a"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VideoModel]:
    """A run in every format, and its model."""
    folder = tmp_path_factory.mktemp("export")
    trained = make_run(folder / "run", method="frozen")
    formats = [f"--format={name}" for name in ("safetensors", "onnx", "torch_export")]
    ended = call_program(main, folder / "run", folder / "out", *formats, "--licence", "mit")
    assert ended.returncode == 0, ended.stderr
    assert "model.onnx: logits differ from the model's by" in ended.stdout
    return folder / "out", trained


def programs(folder: Path) -> list[str]:
    """Those in a card."""
    return PROGRAM.findall((folder / "README.md").read_text(encoding="utf-8"))


GUARD = """
import sys

class Guard:
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        spec = next((spec for finder in self.finders if (spec := finder.find_spec(name, path, target))), None)
        installed = spec is not None and "site-packages" in f"{spec.origin} {spec.submodule_search_locations}"
        return None if installed and name.partition(".")[0] not in ALLOWED else spec

sys.meta_path[:] = [Guard()]
"""
OF_TORCH = (
    "torch torchgen triton nvidia sympy mpmath networkx jinja2 markupsafe filelock fsspec typing_extensions".split()
)
ALLOWED = {
    "onnxruntime": ["numpy", "onnxruntime", "flatbuffers", "google", "packaging"],
    "torch": ["numpy", "safetensors", "torch", *OF_TORCH],
}


@pytest.mark.parametrize(("place", "library"), [(1, "onnxruntime"), (2, "torch")])
def test_the_cards_program_runs_without_this_project(
    place: int, library: str, exported: tuple[Path, VideoModel], tmp_path: Path
) -> None:
    """The very text of the card, where nothing can be imported but the library, what it needs itself, and NumPy."""
    out, trained = exported
    text = programs(out)[place]
    assert library in text and len(text.splitlines()) <= 15
    for path in out.iterdir():
        (tmp_path / path.name).symlink_to(path)
    clip = np.random.default_rng(3).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)
    np.save(tmp_path / "clip.npy", clip)
    child = [sys.executable, "-I", "-c", f"ALLOWED = {ALLOWED[library]}{GUARD}{text}"]
    ended = subprocess.run(child, cwd=tmp_path, env=shell_environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    with torch.inference_mode():
        shares = trained(torch.from_numpy(clip[None]))[0].softmax(-1)
    expected = [f"{shares[number]:.1%} {'abc'[number]}" for number in shares.argsort(descending=True).tolist()]
    assert ended.stdout.splitlines() == expected


def test_the_cards_program_for_this_project(
    exported: tuple[Path, VideoModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, trained = exported
    for path in out.iterdir():
        (tmp_path / path.name).symlink_to(path)
    np.save(tmp_path / "clip.npy", np.zeros((4, 48, 48, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    exec(compile(programs(out)[3], "README.md", "exec"), {})
    with torch.inference_mode():
        top = trained(torch.zeros((1, 4, 48, 48, 3), dtype=torch.uint8))[0].softmax(-1).max()
    assert capsys.readouterr().out.startswith(f"{top:.1%} ")


def test_the_card_says_first_how_predict_takes_it(exported: tuple[Path, VideoModel]) -> None:
    card = (exported[0] / "README.md").read_text(encoding="utf-8")
    use = card.partition("## Use\n\n")[2]
    assert use.startswith("In the project that wrote it, `python tools/predict.py FOLDER VIDEO` says")
    assert "PYTHONPATH=/path/to/image-to-video python" in use


@pytest.mark.parametrize(("sampling", "num_frames"), [("uniform", 26), ("dense", 26), ("dense", 9)])
def test_the_card_cuts_a_clip_as_the_project_does(
    sampling: str, num_frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a video that is stored on its side."""
    network = build("frozen", "tiny-clip", "none", num_classes=2, num_frames=4)
    known = {"sampling": sampling, "interval": 3, "classes": ["a", "b"], "tensors_sha256": ""}
    data = {"sampling": sampling, "interval": 3, "num_frames": 4, "eval_crop": 0.75}
    config = config_from_dict({"deepspeed": BATCH, "data": data})
    card = model_card("x", network, {"model": describe(network), **known}, config=config, answers=None)
    program = PROGRAM.findall(card)[0]
    assert len(program.splitlines()) <= 10
    write_video(tmp_path / "video.mp4", num_frames, rotation=90)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    clip = np.load("clip.npy")
    assert clip.shape == (4, 48, 48, 3) and clip.dtype == np.uint8
    with av.open("video.mp4") as video:
        upright = [frame.to_image().rotate(frame.rotation, expand=True) for frame in video.decode(video=0)]
    numbers = eval_frames(num_frames, ClipOptions(**data), 0)
    left, top, width, height = eval_box(*upright[0].size, ClipOptions(**data), 0)
    for picture, number in zip(clip, numbers, strict=True):
        assert read_number(np.asarray(upright[number])) == number
        expected = upright[number].crop((left, top, left + width, top + height)).resize((48, 48))
        assert np.abs(np.asarray(expected, np.float64) - picture).mean() < 4


def test_every_weight_comes_back_to_the_last_bit(exported: tuple[Path, VideoModel]) -> None:
    out, trained = exported
    loaded, state = model.load(out), trained.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(trained))


def test_what_lies_in_the_folder(exported: tuple[Path, VideoModel]) -> None:
    out, _ = exported
    files = {path.name: path for path in out.iterdir()}
    assert files.keys() == {"config.json", "README.md", "model.safetensors", "model.onnx", "model.pt2"}
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {files["config.json"].stat().st_mode & 0o777}
    document = json.loads(files["config.json"].read_text())
    assert document["classes"] == ["a", "b", "c"] and document["graphs"]["model.onnx"]["opset"] == 20
    for name, said in document["graphs"].items():
        assert said["sha256"] == {name: hashlib.sha256(files[name].read_bytes()).hexdigest()}
        assert said["largest_error"] <= 1e-3
    here = (str(ROOT), str(out.parent), str(Path.home()))
    assert not any(place.encode() in path.read_bytes() for place in here for path in files.values())


def test_the_card_begins_with_its_metadata(exported: tuple[Path, VideoModel]) -> None:
    lines = (exported[0] / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "---"
    head = lines[1 : lines.index("---", 1)]
    assert {'license: "mit"', 'pipeline_tag: "video-classification"', '- "frozen"', '- "onnx"'} <= set(head)
    titles = [line for line in lines if line.startswith("#") and not line.startswith("# model")]
    assert titles == ["# out", *(f"## {part}" for part in PARTS)]
    assert "Accuracy: the run measured none of exactly these weights." in " ".join(lines)


def finish(run: Path, *, step: int) -> None:
    """What a run leaves behind that measured three of four videos right after that step."""
    facts: dict[str, Any] = {"config": {}, "parameters": {}, "packages": {}}
    (run / "run.json").write_text(json.dumps(facts | {"samples": 4, "world_size": 1, "device": ""}))
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "end", "step": step}) + "\n")
    answers = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    names, truth = np.asarray(["a", "b", "c"]), np.asarray([0, 1, 2, 0])
    keys, valid = np.asarray(list("wxyz")), np.ones(4, bool)
    np.savez(run / "predictions.npz", keys=keys, classes=names, logits=answers, labels=truth, valid=valid)


def test_the_card_says_what_the_run_measured_of_these_weights(tmp_path: Path) -> None:
    make_run(tmp_path / "run", pretrained="none")
    for step, said in ((3, "top-1 75.00%, top-5 100.00%"), (4, "measured none of exactly these weights")):
        finish(tmp_path / "run", step=step)
        main([str(tmp_path / "run"), str(tmp_path / f"out{step}")])
        assert said in (tmp_path / f"out{step}" / "README.md").read_text()
    card = (tmp_path / "out3" / "README.md").read_text()
    assert 'Yang et al., "AIM' in card and '| `model.name` | `"tiny-clip"` |' in card


def test_of_several_labels_each_class_has_a_probability_of_its_own() -> None:
    network = build("frozen", "tiny-clip", "none", num_classes=2, num_frames=1)
    graphs = {"model.onnx": {"largest_error": 0.0}, "model.pt2": {"largest_error": 0.0, "torch": "2.11.0"}}
    document = {"model": describe(network), "classes": ["a|b", "`c`"], "graphs": graphs, "tensors_sha256": ""}
    labels = np.asarray([[1, 1]], np.uint8)
    evaluation = Evaluation(np.zeros((1, 2), np.float32), labels, np.ones(1, bool))
    answers = Answers(("x",), ("a", "b"), evaluation)
    card = model_card("x", network, document, config=config_from_dict({"deepspeed": BATCH}), answers=answers)
    texts = PROGRAM.findall(card)
    assert [text.count("softmax") + text.count("scores.sum") for text in texts] == [0, 0, 0, 0]
    assert ["sigmoid" in text or "np.exp(-logits)" in text for text in texts] == [False, True, True, True]
    assert "mAP 100.00%" in card and "`a/b`, `'c'`." in card
    for text in texts:
        compile(text, "README.md", "exec")


def test_adapters_alone_find_their_image_model(tmp_path: Path) -> None:
    trained = make_run(tmp_path / "run")
    main([str(tmp_path / "run"), str(tmp_path / "out"), "--adapters-only"])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    loaded = model.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(trained))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in trained.parameters()]
    given = model.load(tmp_path / "out", pretrained=str(TINY_CLIP_FOLDER / "tiny-clip.safetensors"), head_dropout=0.1)
    assert torch.equal(logits(given), logits(trained))
    with pytest.raises(ValueError, match=r"are not those that the adapters in .* were trained on"):
        model.load(tmp_path / "out", pretrained="none")
    main([str(tmp_path / "out"), str(tmp_path / "whole")])
    assert torch.equal(logits(model.load(tmp_path / "whole")), logits(trained))
    assert open_trained(tmp_path / "whole").classes == ("a", "b", "c")


def test_adapters_alone_say_which_file_they_need(tmp_path: Path) -> None:
    weights = tmp_path / "mine" / "clip.safetensors"
    weights.parent.mkdir()
    shutil.copy(TINY_CLIP_FOLDER / "tiny-clip.safetensors", weights)
    trained = make_run(tmp_path / "run", pretrained=str(weights))
    main([str(tmp_path / "run"), str(tmp_path / "out"), "--adapters-only"])
    with pytest.raises(ValueError, match=r"read from a file \(clip.safetensors\): say where it is"):
        model.load(tmp_path / "out")
    assert torch.equal(logits(model.load(tmp_path / "out", pretrained=str(weights))), logits(trained))
    assert open_trained(tmp_path / "out", [f"model.pretrained={weights}"]).classes == ("a", "b", "c")
    assert not any(str(weights.parent).encode() in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_model_that_reads_names_gets_them_from_a_file(tmp_path: Path) -> None:
    recipe = zero_shot(tmp_path)
    (tmp_path / "names.txt").write_text("run\njump\n")
    main([str(recipe), str(tmp_path / "out"), "--classes", str(tmp_path / "names.txt")])
    assert open_trained(tmp_path / "out").classes == ("run", "jump")
    assert logits(model.load(tmp_path / "out")).shape == (1, 2)
    assert "Radford et al." in (tmp_path / "out" / "README.md").read_text()


def test_words_of_classes_are_named_without_their_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("run\njump\n")
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"run": "running", "jump": "a long jump"}))
    option = f"model.class_texts={words}"
    main([str(zero_shot(tmp_path)), str(tmp_path / "out"), "--set", option, "--classes", str(tmp_path / "names.txt")])
    assert "come from words.json" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert model.load(tmp_path / "out", class_texts=str(words)).num_classes == 2
    assert open_trained(tmp_path / "out", [option]).classes == ("run", "jump")


def zero_shot(folder: Path) -> Path:
    path = folder / "zero.toml"
    path.write_text(
        '[model]\nmethod = "zero_shot"\nname = "tiny-clip"\npretrained = "shapes"\n[data]\nnum_frames = 4\n'
    )
    return path


def test_files_of_graphs_alone_are_no_weights(exported: tuple[Path, VideoModel], tmp_path: Path) -> None:
    document = json.loads((exported[0] / "config.json").read_text())
    del document["tensors_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"holds model.onnx, model.pt2, to be run without this project"):
        model.load(tmp_path)


WRONG: dict[str, tuple[str, ...]] = {
    "OUT/run OUT/taken": ("taken is there already", "another name"),
    "OUT/run OUT/a_file/new": ("a_file is a file",),
    "OUT/run OUT/new --format tensorrt": ("--format tensorrt", "allowed is safetensors, torch_export, onnx"),
    "OUT/run OUT/new --format onnx --adapters-only": ("--adapters-only", "leave one of them out"),
    "OUT/nothing OUT/new": ("nothing is no folder", "a run"),
    "OUT/a_file OUT/new": ("a_file is a file", "convert"),
    "OUT/empty OUT/new": ("is neither a run",),
    "OUT/zero.toml OUT/new": ("was told none", "--classes FILE"),
    "OUT/zero.toml OUT/new --adapters-only --classes OUT/names": ("--adapters-only is for a run",),
    "OUT/run OUT/new --classes OUT/names": ("the names are known",),
    "OUT/run OUT/new --classes OUT/absent": ("absent",),
    "OUT/published OUT/new --classes OUT/names": ("names has 2 names, and the model 5 classes",),
    "OUT/published OUT/new --adapters-only": ("--adapters-only is for a run", "export it whole"),
    "OUT/published OUT/new --format onnx": ("names of the classes are not known", "--classes FILE"),
    "OUT/run OUT/new --set model.adaptor_scale=1": ("adaptor_scale",),
    "OUT/damaged OUT/new": ("state.safetensors is damaged",),
    "OUT/finetuned OUT/new --adapters-only": ("all of this model trains", "export the whole model"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    make_run(folder / "run", pretrained="none", method="frozen")
    make_run(folder / "finetuned", pretrained="none", method="finetuned")
    shutil.copytree(folder / "run", folder / "damaged")
    with (folder / "damaged" / "checkpoint-000003" / "state.safetensors").open("r+b") as file:
        file.truncate(5000)
    write_folder(convert(saved(official_files.aim_clip(), folder / "a.safetensors")), folder / "published")
    zero_shot(folder)
    (folder / "a_file").write_text("x")
    (folder / "names").write_text("run\njump\n")
    (folder / "empty").mkdir()
    (folder / "taken").mkdir()
    (folder / "taken" / "x").touch()
    return folder


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_said_in_one_line(words: str, places: Path) -> None:
    before = sorted(places.iterdir())
    ended = call_program(main, *(word.replace("OUT", str(places)) for word in words.split()))
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and len(ended.stderr.splitlines()) == 1
    assert all(part in ended.stderr for part in WRONG[words]), ended.stderr
    assert sorted(places.iterdir()) == before
