"""Published checkpoints: read safely and wholly, kept as a folder, loaded with settings, written back bit-equal."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import model
from model import checkpoints
from model.checkpoints import Converted, convert, read_folder, write_folder, write_official
from model.geometry import ImageTower, ViTGeometry
from model.methods import FORMATS, create
from model.methods.aim import AIMOptions
from tests import official_files
from tests.official_files import Shapes, filled, saved

WRITERS: dict[str, Callable[..., Shapes]] = {name: getattr(official_files, name) for name in FORMATS}
TWO = ("S_Adapter", "T_Adapter_in", "T_Adapter", "MLP_Adapter")
BLOCK = "backbone.transformer.resblocks.1."


def folder(shapes: Shapes, path: Path) -> Path:
    """The folder that a checkpoint of these shapes becomes."""
    write_folder(convert(saved(shapes, path.with_suffix(".safetensors"))), path)
    return path


def outputs(loaded: torch.nn.Module, frames: int, seed: int = 0) -> Tensor:
    size = loaded.geometry.image_size
    clips = torch.randn(2, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return loaded(clips)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(official_files.aim_clip(), tmp_path_factory.mktemp("tiny") / "aim")


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_is_equal_to_the_bit(name: str, tmp_path: Path) -> None:
    out = folder(WRITERS[name](), tmp_path / "converted")
    for suffix in (".safetensors", ".pth"):
        entry = write_official(read_folder(out), tmp_path / f"back{suffix}", FORMATS[name].family)
        assert entry.name == name
    first, back = load_file(tmp_path / "converted.safetensors"), load_file(tmp_path / "back.safetensors")
    assert first.keys() == back.keys() and all(torch.equal(first[key], back[key]) for key in first)
    pth = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(pth) == ["state_dict"] and all(torch.equal(first[key], pth["state_dict"][key]) for key in first)
    again = convert(tmp_path / "back.pth", source=FORMATS[name].family)
    assert again.description == convert(tmp_path / "converted.safetensors").description
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "efficient_prompt"])  # which has no head
def test_a_loaded_model_gives_logits_and_without_a_head_the_backbones_output(name: str, tmp_path: Path) -> None:
    loaded = model.load(folder(WRITERS[name](), tmp_path / "a"))
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    frames = loaded.num_frames
    assert frames == {
        "video_swin": 32,
        "dualpath": 16,
        "st_adapter": 8,
        "vpt": 1,
        "adaptformer_image": 1,
        "adaptformer_video": 16,
        "side4video": 8,
    }.get(name, 4)
    logits = outputs(loaded, frames)
    assert logits.shape == (2, 5)
    bare = model.load(folder(WRITERS[name](classes=None), tmp_path / "b"))
    expected = {
        "aim_swin": [2, 64, 2, 7, 7],
        "video_swin": [2, 64, 16, 7, 7],
        "timesformer": [2, 128],
        "dualpath": [2, 64],
        "st_adapter": [2, 128],
        "vpt": [2, 128, 1, 1, 1],
        "adaptformer_image": [2, 128, 1, 1, 1],
        "adaptformer_video": [2, 128],
        "evl": [2, 128],
        "side4video": [2, 64],
    }
    features = outputs(bare, frames)
    assert list(features.shape) == expected.get(name, [2, 128, 4, 1, 1])
    pooled = features.flatten(2).mean(2) if features.ndim > 2 else features
    assert loaded.cls_head is not None
    with torch.inference_mode():
        torch.testing.assert_close(loaded.cls_head(pooled), logits)


def test_in21k_equals_timms_own_model_frame_by_frame(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    image_model = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=128, depth=2, num_heads=2, num_classes=0
    ).eval()
    for parameter in image_model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = filled(official_files.aim_in21k(classes=None))
    for name, tensor in image_model.state_dict().items():
        state[f"backbone.{name.replace('norm.', 'ln_post.') if name.startswith('norm.') else name}"] = tensor.clone()
    for name in state:
        if "D_fc2" in name or "temporal_embedding" in name:
            state[name] = torch.zeros_like(state[name])
    save_file(state, tmp_path / "in21k.safetensors")
    write_folder(convert(tmp_path / "in21k.safetensors"), tmp_path / "in21k")
    loaded = model.load(tmp_path / "in21k")
    clips = torch.randn(2, 4, 3, 32, 32)
    with torch.inference_mode():
        ours = loaded(clips)
        theirs = image_model.forward_features(clips.flatten(0, 1))[:, 0].unflatten(0, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(ours[..., 0, 0], theirs, atol=1e-5, rtol=1e-5)


def test_in21k_equals_aim_built_directly(tmp_path: Path) -> None:
    shapes = official_files.aim_in21k()
    loaded = model.load(folder(shapes, tmp_path / "in21k"))
    state = filled(shapes)
    geometry = ViTGeometry(128, 2, 2, 16, 32, False, (0.5,) * 3, (0.5,) * 3, ln_pre=False, patch_bias=True, eps=1e-6)
    direct = create("aim", ImageTower(geometry, {}), num_classes=5, num_frames=4, options=AIMOptions()).eval()
    places = {
        "class_embedding": state["backbone.cls_token"][0, 0],
        "positional_embedding": state["backbone.pos_embed"][0],
        "conv1.weight": state["backbone.patch_embed.proj.weight"],
        "conv1.bias": state["backbone.patch_embed.proj.bias"],
    }
    parts = {"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1"}
    parts |= {"mlp.c_proj": "mlp.fc2", "attn.in_proj_weight": "attn.qkv.weight", "attn.in_proj_bias": "attn.qkv.bias"}
    with torch.no_grad():
        for name, parameter in direct.named_parameters():
            theirs = name.replace("transformer.resblocks", "blocks")
            for our_part, their_part in parts.items():
                theirs = theirs.replace(our_part, their_part)
            parameter.copy_(places.get(name.removeprefix("backbone."), state.get(theirs)))
    assert torch.equal(outputs(loaded, 4), outputs(direct, 4))


def test_scale_and_frames_by_default_and_as_settings(tiny: Path, tmp_path: Path) -> None:
    two = folder(official_files.aim_clip(adapters=TWO), tmp_path / "two")
    assert model.load(tiny).options.adapter_scale == 0.5
    assert model.load(two).options.adapter_scale == 1.0
    by_default = outputs(model.load(two), 4)
    assert torch.equal(outputs(model.load(two, scale=1), 4), by_default)
    half = outputs(model.load(two, scale=0.5), 4)
    assert (half - by_default).abs().max() > 1e-3
    assert torch.equal(outputs(model.load(two, adapter_scale=0.5), 4), half)
    other = outputs(model.load(tiny, quick_gelu=False, heads=4), 4)
    assert (other - outputs(model.load(tiny), 4)).abs().max() > 1e-4
    frozen = folder(official_files.aim_clip(adapters=(), frames=None), tmp_path / "frozen")
    assert model.load(frozen).num_frames == 8
    assert outputs(model.load(frozen, num_frames=3), 3).shape == (2, 5)


def test_another_number_of_frames_interpolates_the_embedding_and_says_so_once(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = model.load(tiny, num_frames=8)
    assert len(caplog.records) == 1 and "temporal_embedding from 4 to 8 rows" in caplog.text
    stored = read_folder(tiny).tensors["backbone.temporal_embedding"]
    embedding = loaded.backbone.temporal_embedding
    assert embedding.shape == (1, 8, 128)
    torch.testing.assert_close(embedding[:, 1], 0.75 * stored[:, 0] + 0.25 * stored[:, 1])
    torch.testing.assert_close(embedding[:, 0], stored[:, 0])
    caplog.clear()
    model.load(tiny, num_frames=4)
    assert not caplog.records


def test_swins_temporal_tables_keep_their_ends_and_their_middle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = folder(official_files.aim_swin(), tmp_path / "swin")
    name = "backbone.layers.1.blocks.0.attn.temporal_position_bias_table"
    stored = read_folder(out).tensors[name]
    longer = dict(model.load(out, num_frames=8).named_parameters())[name]
    assert (stored.shape, longer.shape) == ((3, 2), (7, 2))
    torch.testing.assert_close(longer[[0, 3, 6]], stored)
    assert len(caplog.records) == 1 and "and 1 more" in caplog.text


def test_buffers_keep_their_constructed_values_and_are_listed(tmp_path: Path) -> None:
    without = convert(saved(official_files.aim_swin(), tmp_path / "a.safetensors"))
    assert "backbone.layers.0.blocks.0.attn.relative_position_index" in without.kept_buffers and not without.dropped
    state = filled(official_files.aim_swin())
    full = official_files.aim_swin(buffers=True)
    state |= {name: torch.zeros(shape, dtype=torch.long) for name, shape in full.items() if name not in state}
    save_file(state, tmp_path / "b.safetensors")
    given = convert(tmp_path / "b.safetensors")
    dropped = dict(given.dropped)
    assert "computed from the geometry" in dropped["backbone.layers.0.blocks.1.attn_mask"]
    assert "backbone.layers.0.blocks.0.attn.relative_position_index" not in given.kept_buffers
    assert all(torch.equal(given.tensors[name], without.tensors[name]) for name in without.tensors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": 1}, "unknown setting 'scales'; of this model can be set: num_frames, scale, adapter_scale"),
        ({"width": 256}, "unknown setting 'width'"),
        ({"adapters": ()}, "unknown setting 'adapters'"),
        ({"scale": 1, "adapter_scale": 1}, "two names of one setting"),
        ({"scale": "1"}, "model.options.adapter_scale = '1'"),
        ({"scale": float("nan")}, "model.options.adapter_scale = nan"),
        ({"num_frames": 0}, "model.num_frames = 0"),
        ({"heads": 3}, "allowed is a divisor"),
        ({"backbone": 1}, "unknown setting 'backbone'"),
    ],
)
def test_a_wrong_setting_is_named(tiny: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        model.load(tiny, **settings)
    assert message in str(error.value)


def test_loading_leaves_the_random_state_alone(tiny: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model.load(tiny)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state", None])
@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_files_are_read_whatever_wraps_them(wrapper: str | None, legacy: bool, tmp_path: Path) -> None:
    state = filled(official_files.timesformer())
    beside = {"meta": {"epoch": 3, "time": "now"}, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
    document = state if wrapper is None else {wrapper: {f"module.{k}": v for k, v in state.items()}, **beside}
    torch.save(document, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    converted = convert(tmp_path / "a.pth")
    assert converted.source == "timesformer" and len(converted.tensors) == len(state)
    names = [] if wrapper is None else ["meta", "optimizer"]
    assert [name for name, _ in converted.dropped] == names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in filled(official_files.aim_clip()).items()}
    torch.save(state, tmp_path / "a.pt")
    tensors = convert(tmp_path / "a.pt").tensors
    assert all(torch.equal(tensors[name], state[name].float()) for name in state)


class Planted:
    """What must not be made when a file is read."""


def _change(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.update({name: change(state[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(f"{BLOCK}mlp.c_fc.bias", lambda t: t.fill_(float("nan"))), f"{BLOCK}mlp.c_fc.bias holds NaN"),
        (_change("backbone.ln_post.bias", lambda t: t.double() * 1e300), "ln_post.bias holds an infinite number"),
        (_change("backbone.ln_post.bias", lambda t: t.long()), "ln_post.bias is of int64"),
        (_change("backbone.ln_post.bias", lambda t: t[:5].clone()), "has the shape [5], and the others ask for [128]"),
        (_change("backbone.ln_post.bias", lambda t: 3), "backbone.ln_post.bias is no plain tensor, but int"),
        (_change("backbone.ln_post.bias", lambda t: t.to_sparse()), "is no plain tensor"),
        (_change(f"{BLOCK}attn.in_proj_bias", lambda t: t[:1].expand(10**9)), "more than the file holds"),
        (lambda s: s.pop(f"{BLOCK}ln_2.bias"), f"there is no {BLOCK}ln_2.bias, which this aim_clip model needs"),
        (
            lambda s: s.update({f"{BLOCK}ln_2.biass": s.pop(f"{BLOCK}ln_2.bias")}),
            f"unknown tensor {BLOCK}ln_2.biass in the format aim_clip; is it {BLOCK}ln_2.bias, which is missing?",
        ),
        (lambda s: s.update({"backbone.strange": torch.zeros(1)}), "unknown tensor backbone.strange"),
        (lambda s: s.update(filled(official_files.aim_in21k())), "names of several formats"),
        (lambda s: s.clear(), "holds no state dict"),
        (lambda s: s.update({3: torch.zeros(1)}), "the key '3' is no name"),
        (lambda s: s.update({"backbone.hook": Planted()}), "holds pickled Python objects (tests"),
    ],
)
def test_a_tensor_that_is_not_as_it_should_be_is_named(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    state: dict[str, Any] = filled(official_files.aim_clip())
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "a.pth")
    text = str(error.value)
    assert message.replace("tests", Planted.__module__) in text and "\n" not in text and "a.pth" in text


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(ValueError) as error:
            convert(path)
        assert "\n" not in str(error.value) and path.name in str(error.value)
        return str(error.value)

    torch.save(filled(official_files.aim_clip()), tmp_path / "whole.pth")
    saved(official_files.aim_clip(), tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        data = (tmp_path / name).read_bytes()
        for part, cut in (("half", len(data) // 2), ("end", len(data) - 10)):
            (tmp_path / f"{part}-{name}").write_bytes(data[:cut])
            assert "is not a whole" in refusal(tmp_path / f"{part}-{name}")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "empty.pth").touch()
    for name in ("text.pth", "empty.pth"):
        assert "is no weight file" in refusal(tmp_path / name)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    refusal(tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("a/readme.txt", "hello")
    assert "is not a whole PyTorch file" in refusal(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "nothing.pth")


def test_a_flipped_bit_in_a_pytorch_file_is_seen(tmp_path: Path) -> None:
    """torch.load does not look at the checksums of the archive: it would give other weights in silence."""
    state = filled(official_files.aim_clip())
    torch.save(state, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[data.index(state["backbone.conv1.weight"].numpy().tobytes()) + 1000] ^= 1
    (tmp_path / "a.pth").write_bytes(data)
    assert not all(torch.equal(value, state[name]) for name, value in torch.load(tmp_path / "a.pth").items())
    with pytest.raises(ValueError, match=r"a\.pth is not a whole PyTorch file: a/data/\d+ is damaged"):
        convert(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "clip.pt"))
    with pytest.raises(ValueError, match=r"TorchScript archive.*torch\.jit\.load.*convert that file"):
        convert(tmp_path / "clip.pt")


def test_a_demanded_format_must_be_the_files(tmp_path: Path) -> None:
    path = saved(official_files.aim_in21k(), tmp_path / "a.safetensors")
    assert convert(path, "aim").source == convert(path, "aim_in21k").source == "aim_in21k"
    with pytest.raises(ValueError, match=r"names of aim_in21k .*, not of timesformer"):
        convert(path, "timesformer")
    with pytest.raises(ValueError, match=r"unknown format 'aimm'; allowed is auto, .*aim, aim_clip"):
        convert(path, "aimm")


def test_nothing_is_overwritten_and_nothing_is_left_half_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = read_folder(tiny)
    for write in (lambda out: write_folder(stored, out), lambda out: write_official(stored, out, "aim")):
        (tmp_path / "there.pth").touch()
        with pytest.raises(ValueError, match=r"there.* is there already; remove it"):
            write(tmp_path / "there.pth")
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.pth"):
        write_official(stored, tmp_path / "a.bin", "aim")
    with pytest.raises(ValueError, match=r"published in the format aim_clip, not timesformer: say --to aim"):
        write_official(stored, tmp_path / "a.pth", "timesformer")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "_sync", fail)
    with pytest.raises(OSError, match="no space"):
        write_folder(stored, tmp_path / "new")
    with pytest.raises(OSError, match="no space"):
        write_official(stored, tmp_path / "new.pth", "aim")
    assert [path.name for path in tmp_path.iterdir()] == ["there.pth"]
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    write_folder(stored, tmp_path / "empty")
    assert read_folder(tmp_path / "empty").description == stored.description


def test_a_folder_of_an_earlier_version_opens(tiny: Path, tmp_path: Path) -> None:
    write_folder(read_folder(tiny), tmp_path / "out")
    (tmp_path / "out" / "config.json").rename(tmp_path / "out" / "model.json")
    assert read_folder(tmp_path / "out").description == read_folder(tiny).description


def test_another_programs_config_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["ViTModel"], "hidden_size": 768}')
    with pytest.raises(ValueError, match=r"config.json is damaged, or another program's"):
        read_folder(tmp_path)


def _document(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((out / "config.json").read_text())
    change(document)
    (out / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "config.json").unlink(), "is no converted checkpoint"),
        (lambda out: (out / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda out: (out / "config.json").write_text("{"), "config.json is damaged"),
        (lambda out: (out / "config.json").write_text("[" * 100_000), "config.json is damaged"),
        (lambda out: (out / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda out: _document(out, lambda d: d.pop("model")), "config.json is damaged"),
        (lambda out: _document(out, lambda d: d.update(model=3)), "config.json is damaged"),
        (lambda out: _document(out, lambda d: d.update(format_version=2)), "has format version 2"),
        (lambda out: _document(out, lambda d: d["model"].update(method="os")), "model.method = 'os'"),
        (lambda out: _document(out, lambda d: d["model"]["geometry"].update(layers=3)), "resblocks.2"),
        (lambda out: _document(out, lambda d: d["model"].update(num_classes=9)), "do not fit config.json"),
        (lambda out: _document(out, lambda d: d.update(classes="ab")), "classes = 'ab'; allowed is a list of names"),
        (lambda out: _document(out, lambda d: d.update(classes=["a", 2, "c", "d", "e"])), "allowed is a list of names"),
        (lambda out: _document(out, lambda d: d.update(classes=["a"])), "classes has 1 names; num_classes = 5"),
        (lambda out: _document(out, lambda d: d.update(sampling=["dense"])), "allowed is dense or uniform"),
        (lambda out: _document(out, lambda d: d.update(interval=True)), "interval = True; allowed is 1 to 1024"),
        (lambda out: _document(out, lambda d: d.update(interval=0)), "interval = 0; allowed is 1 to 1024"),
        (lambda out: (out / "model.safetensors").open("ab").write(b"x"), "is damaged (checksum)"),
    ],
)
def test_a_damaged_folder_is_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    out = folder(official_files.aim_clip(), tmp_path / "out")
    damage(out)
    with pytest.raises((ValueError, OSError)) as error:
        model.load(out)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_as_it_stands_becomes_a_folder(tiny: Path, tmp_path: Path) -> None:
    loaded = model.load(tiny, scale=0.25)
    converted = checkpoints.of_model(loaded)
    assert isinstance(converted, Converted) and converted.source == "run"
    assert checkpoints.count(converted) == checkpoints.count(convert(tiny.with_suffix(".safetensors")))
    write_folder(converted, tmp_path / "again")
    again = model.load(tmp_path / "again")
    assert again.options.adapter_scale == 0.25
    assert torch.equal(outputs(again, 4), outputs(loaded, 4))


def test_what_is_known_of_a_training_is_kept_and_what_is_not_is_none(tiny: Path, tmp_path: Path) -> None:
    known = dataclasses.replace(read_folder(tiny), classes=tuple("abcde"), sampling="uniform", interval=3)
    write_folder(known, tmp_path / "known")
    found = [read_folder(path) for path in (tmp_path / "known", tiny)]
    assert [(one.classes, one.sampling, one.interval) for one in found] == [(tuple("abcde"), "uniform", 3), (None,) * 3]
    assert not {"classes", "sampling", "interval"} & json.loads((tiny / "config.json").read_text()).keys()


def test_settings_are_kept_in_the_folder_and_no_longer_assumed(tiny: Path, tmp_path: Path) -> None:
    first = convert(tiny.with_suffix(".safetensors"))
    changed = checkpoints.with_settings(first, {"scale": 2, "mean": [0.1, 0.2, 0.3], "num_frames": 8})
    assert first.assumed.keys() - changed.assumed.keys() == {"adapter_scale", "mean"}
    write_folder(changed, tmp_path / "out")
    stored, by_settings = model.load(tmp_path / "out"), model.load(tiny, scale=2, mean=[0.1, 0.2, 0.3], num_frames=8)
    assert (stored.options, stored.geometry) == (by_settings.options, by_settings.geometry)
    assert torch.equal(outputs(stored, 8), outputs(by_settings, 8))


@pytest.mark.parametrize("name", FORMATS)
def test_what_official_names_lose_is_what_conversion_assumes_otherwise(name: str, tmp_path: Path) -> None:
    converted = convert(saved(WRITERS[name](), tmp_path / "a.safetensors"))
    assert checkpoints.lost_settings(converted) == {}
    option = "temperature" if name == "efficient_prompt" else "head_dropout"
    changed = checkpoints.with_settings(converted, {option: 0.25, "std": (0.5, 0.25, 0.5)})
    assert checkpoints.lost_settings(changed) == {option: 0.25, "std": (0.5, 0.25, 0.5)}


def test_a_model_that_cannot_be_read_back_is_named(tiny: Path) -> None:
    geometry = ViTGeometry(96, 2, 2, 16, 32, True, (0.5,) * 3, (0.5,) * 3)
    narrow = checkpoints.of_model(create("aim", ImageTower(geometry, {}), num_classes=5, num_frames=4))
    with pytest.raises(ValueError, match="the width 96 is no multiple of 64"):
        checkpoints.lost_settings(narrow)


def test_a_path_that_is_no_converted_folder_is_told_what_it_is(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-000003").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-000003" / "state.json").touch()
    (tmp_path / "empty").mkdir()
    file = tiny.with_suffix(".safetensors")
    for path, message in (
        (file, f"is a file; convert it to a folder of another name: python tools/convert_checkpoint.py {file} NEW"),
        (tmp_path / "run", f"is of a training run, .* python tools/convert_checkpoint.py {tmp_path / 'run'} NEW"),
        (tmp_path / "run" / "checkpoint-000003", "is of a training run"),
        (tmp_path / "empty", "a folder with config.json and model.safetensors is expected"),
        (tmp_path / "none", "is no converted checkpoint"),
    ):
        with pytest.raises(OSError, match=message) as error:
            model.load(path)
        assert "\n" not in str(error.value)
