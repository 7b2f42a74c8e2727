"""AIM on Swin and Video Swin: parity with independent implementations, invariants, and what trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torchvision.models.video import SwinTransformer3d

from model.geometry import ImageTower, SwinGeometry
from model.methods.aim import AIMOptions
from model.methods.swin import AIMSwin, VideoSwin, VideoSwinOptions, inflate
from model.video import VideoModel

SMALL = SwinGeometry(width=32, depths=(2, 2), heads=(1, 2), image_size=56)
"""Two stages, of 14 × 14 tokens (2 × 2 windows, shifted) and of 7 × 7 (one window, never shifted)."""
FRAMES = 8
M = TypeVar("M", bound=nn.Module)
Make = Callable[[], VideoModel]
OFFICIAL_AIM = {  # stage 0 of SMALL, 4 time steps; T_Adapter and its table in the first block alone
    "patch_embed.proj.weight": (32, 3, 2, 4, 4),
    "patch_embed.proj.bias": (32,),
    "patch_embed.norm.weight": (32,),
    "patch_embed.norm.bias": (32,),
    "layers.0.blocks.0.T_Adapter.D_fc1.weight": (8, 32),
    "layers.0.blocks.0.T_Adapter.D_fc1.bias": (8,),
    "layers.0.blocks.0.T_Adapter.D_fc2.weight": (32, 8),
    "layers.0.blocks.0.T_Adapter.D_fc2.bias": (32,),
    "layers.0.blocks.0.attn.temporal_position_bias_table": (7, 1),
    "layers.0.downsample.reduction.weight": (64, 128),
    "layers.0.downsample.norm.weight": (128,),
    "layers.0.downsample.norm.bias": (128,),
    **{
        f"layers.0.blocks.{block}.{name}": shape
        for block in (0, 1)
        for name, shape in {
            "norm1.weight": (32,),
            "norm1.bias": (32,),
            "attn.relative_position_bias_table": (169, 1),
            "attn.qkv.weight": (96, 32),
            "attn.qkv.bias": (96,),
            "attn.proj.weight": (32, 32),
            "attn.proj.bias": (32,),
            "norm2.weight": (32,),
            "norm2.bias": (32,),
            "mlp.fc1.weight": (128, 32),
            "mlp.fc1.bias": (128,),
            "mlp.fc2.weight": (32, 128),
            "mlp.fc2.bias": (32,),
            "S_Adapter.D_fc1.weight": (8, 32),
            "S_Adapter.D_fc1.bias": (8,),
            "S_Adapter.D_fc2.weight": (32, 8),
            "S_Adapter.D_fc2.bias": (32,),
            "S_Adapter2.D_fc1.weight": (8, 32),
            "S_Adapter2.D_fc1.bias": (8,),
            "S_Adapter2.D_fc2.weight": (32, 8),
            "S_Adapter2.D_fc2.bias": (32,),
        }.items()
    },
}


def aim(options: AIMOptions | None = None, classes: int | None = 5, frames: int = FRAMES) -> AIMSwin:
    torch.manual_seed(0)
    return busy(AIMSwin(ImageTower(SMALL, {}), classes, frames, options or AIMOptions()))


def video_swin(
    window: int = 8, frames: int = 2 * FRAMES, geometry: SwinGeometry = SMALL, classes: int | None = 5
) -> VideoSwin:
    torch.manual_seed(0)
    return busy(VideoSwin(ImageTower(geometry, {}), classes, frames, VideoSwinOptions(temporal_window=window)))


def busy(model: M) -> M:
    """Weights far from any special value, so that nothing cancels or vanishes."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if "norm" in name and name.endswith("weight"):
            parameter.data = 1 + 0.2 * noise
        else:
            parameter.data = noise * (0.5 if "table" in name else 0.1)
    return model.eval()


def clips(model: VideoModel, count: int = 2, seed: int = 3) -> Tensor:
    size = model.geometry.image_size
    return torch.randn(count, model.num_frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


class Naive:
    """The published AIM on Swin, one picture and one place at a time, from a state dict."""

    def __init__(self, state: dict[str, Tensor], geometry: SwinGeometry) -> None:
        self.state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
        self.geometry = geometry

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

    def adapter(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.D_fc2", F.gelu(self.linear(f"{name}.D_fc1", x)))

    def attend(self, name: str, x_NC: Tensor, bias_hNN: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (-1, 32)).transpose(0, 1) for part in self.linear(f"{name}.qkv", x_NC).chunk(3, 1))
        weights = (q @ k.transpose(1, 2) / 32**0.5 + bias_hNN).softmax(2)
        return self.linear(f"{name}.proj", (weights @ v).transpose(0, 1).flatten(1))

    def picture_bias(self, name: str, side: int, shift: int) -> Tensor:
        """Over a whole picture: tokens attend if they share a window and are less than a window apart."""
        w = self.geometry.window
        y, x = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        window = (y - shift) % side // w * side + (x - shift) % side // w
        dy, dx = y[:, None] - y, x[:, None] - x
        allowed = (window[:, None] == window) & (dy.abs() < w) & (dx.abs() < w)
        row = ((dy + w - 1) * (2 * w - 1) + dx + w - 1).where(allowed, 0)
        table = self.state[f"{name}.relative_position_bias_table"]
        return table[row].permute(2, 0, 1).masked_fill(~allowed, float("-inf"))

    def block(self, name: str, x_THWC: Tensor, shifted: bool) -> Tensor:
        x = x_THWC.clone()
        steps, side = x.shape[:2]
        attn, w = f"{name}.attn", self.geometry.window
        if f"{name}.T_Adapter.D_fc1.weight" in self.state:
            t = torch.arange(steps)
            table = self.state[f"{attn}.temporal_position_bias_table"]
            bias = table[t[:, None] - t + steps - 1].permute(2, 0, 1)
            for i in range(side):
                for j in range(side):
                    y = self.attend(attn, self.norm(f"{name}.norm1", x[:, i, j]), bias)
                    x[:, i, j] = x[:, i, j] + self.adapter(f"{name}.T_Adapter", y)
        bias = self.picture_bias(attn, side, w // 2 if shifted and side > w else 0)
        for step in range(steps):
            y = self.attend(attn, self.norm(f"{name}.norm1", x[step]).flatten(0, 1), bias).view_as(x[step])
            if f"{name}.S_Adapter2.D_fc1.weight" in self.state:
                y = y + self.adapter(f"{name}.S_Adapter2", y)
            x[step] = x[step] + y
        y = self.norm(f"{name}.norm2", x)
        x = x + self.linear(f"{name}.mlp.fc2", F.gelu(self.linear(f"{name}.mlp.fc1", y)))
        return x + 0.5 * self.adapter(f"{name}.S_Adapter", y) if f"{name}.S_Adapter.D_fc1.weight" in self.state else x

    def clip(self, frames_T3HW: Tensor) -> Tensor:
        weight, bias = self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"]
        x = F.conv3d(frames_T3HW.transpose(0, 1)[None], weight, bias, stride=(2, 4, 4))[0].permute(1, 2, 3, 0)
        x = self.norm("patch_embed.norm", x)
        for stage, depth in enumerate(self.geometry.depths):
            for i in range(depth):
                x = self.block(f"layers.{stage}.blocks.{i}", x, i % 2 == 1)
            if stage + 1 < len(self.geometry.depths):
                corners = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
                merged = self.norm(f"layers.{stage}.downsample.norm", torch.cat(corners, 3))
                x = self.linear(f"layers.{stage}.downsample.reduction", merged)
        return self.norm("norm", x).permute(3, 0, 1, 2)


@pytest.mark.parametrize(
    "options",
    [
        AIMOptions(),
        AIMOptions(adapters=("temporal",), adapter_ratio=0.5),
        AIMOptions(adapters=("spatial", "joint"), positions="every 2"),
        AIMOptions(adapters=()),
    ],
)
def test_aim_equals_a_naive_reference(options: AIMOptions) -> None:
    model = aim(options, classes=None)
    x = clips(model)
    with torch.no_grad():
        expected = torch.stack([Naive(dict(model.state_dict()), SMALL).clip(clip) for clip in x])
        ours = model(x)
    assert ours.shape == (2, 64, FRAMES // 2, 7, 7)
    close(ours, expected, 1e-5)


def test_aim_head_averages_over_time_and_space() -> None:
    model, headless = aim(), aim(classes=None)
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("cls_head")})
    with torch.no_grad():
        assert model.cls_head is not None
        close(model(clips(model)), model.cls_head(headless(clips(model)).mean((2, 3, 4))), 1e-5)


def image_model() -> tuple[SwinTransformer, dict[str, Tensor]]:
    """timm's Swin of the geometry SMALL, and its weights under the official names."""
    torch.manual_seed(1)
    model = SwinTransformer(
        img_size=56, embed_dim=32, depths=(2, 2), num_heads=(1, 2), window_size=7, num_classes=0
    ).eval()
    busy(model)
    state = {
        re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): parameter.data
        for name, parameter in model.named_parameters()
    }
    return model, state


def test_aim_starts_as_the_image_model_for_frames_equal_in_pairs() -> None:
    image, state = image_model()
    model = AIMSwin(ImageTower(SMALL, state), None, FRAMES, AIMOptions()).eval()
    pictures = clips(model)[:, : FRAMES // 2]
    with torch.no_grad():
        expected = image.forward_features(pictures.flatten(0, 1)).unflatten(0, (2, FRAMES // 2))
        close(model(pictures.repeat_interleave(2, 1)), expected.permute(0, 4, 1, 2, 3), 1e-5)


def test_image_weights_are_inflated() -> None:
    _, state = image_model()
    model = VideoSwin(ImageTower(SMALL, state), None, 2 * FRAMES, VideoSwinOptions()).eval()
    ours, table = dict(model.backbone.named_parameters()), "layers.0.blocks.1.attn.relative_position_bias_table"
    assert torch.equal(ours["patch_embed.proj.weight"][:, :, 1], state["patch_embed.proj.weight"] / 2)
    assert torch.equal(ours[table].view(15, 169, 1)[9], state[table])
    picture = clips(model, count=1)[:, :1]
    with torch.no_grad():
        out = model(picture.expand(-1, 2 * FRAMES, -1, -1, -1))
    # What the mask of a window shifted in time takes away, a still clip has as often in what it leaves.
    close(out, out[:, :, :1].expand_as(out), 1e-5)
    with pytest.raises(ValueError, match=r"missing \['norm.bias'\]"):
        VideoSwin(ImageTower(SMALL, {k: v for k, v in state.items() if k != "norm.bias"}), 5, 16, VideoSwinOptions())


def torchvision_names(reference: SwinTransformer3d) -> dict[str, Tensor]:
    """Parameters of torchvision's Video Swin under the official names."""
    state = {}
    for name, parameter in reference.named_parameters():
        if match := re.fullmatch(r"features\.(\d+)\.(.*)", name):
            stage, kind = divmod(int(match[1]), 2)
            name = f"layers.{stage}.{'downsample' if kind else 'blocks'}.{match[2]}"
        name = name.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        state[f"cls_head.fc_cls.{name[5:]}" if name.startswith("head.") else f"backbone.{name}"] = parameter.data
    return state


@pytest.mark.parametrize(("window", "frames"), [(8, 32), (16, 32), (8, 8)])
def test_video_swin_equals_torchvision(window: int, frames: int) -> None:
    """Windows that shift in time, that cover it, and that are longer than it."""
    model = video_swin(window, frames)
    torch.manual_seed(2)
    reference = busy(
        SwinTransformer3d(
            patch_size=[2, 4, 4],
            embed_dim=32,
            depths=[2, 2],
            num_heads=[1, 2],
            window_size=[window, 7, 7],
            stochastic_depth_prob=0.0,
            num_classes=5,
        )
    )
    model.load_state_dict(torchvision_names(reference))
    x = clips(model)
    with torch.no_grad():
        close(model(x), reference(x.transpose(1, 2)), 1e-6)


def test_shifted_windows_are_masked() -> None:
    """What the rolled picture brings together does not meet: the far corner cannot see the near one in one stage."""
    one_stage = SwinGeometry(width=32, depths=(2,), heads=(1,), image_size=56)
    for model in (
        video_swin(4, geometry=one_stage, classes=None),
        AIMSwin(ImageTower(one_stage, {}), None, 8, AIMOptions()),
    ):
        x = clips(model, count=1)
        changed = x.clone()
        changed[:, :2, :, :4, :4] += 1  # the token in the first corner of the first step
        with torch.no_grad():
            difference = (model(changed) - model(x)).abs().amax(1)[0]
        assert difference[0, 0, 0] > 0.01 and difference[:, 10:, :].max() == 0 and difference[:, :, 10:].max() == 0


@pytest.mark.parametrize("make", [aim, video_swin])
def test_clips_do_not_meet(make: Make) -> None:
    model = make()
    x = clips(model, count=3)
    changed = torch.cat([x[:1], 2 * x[1:2], x[2:]])
    with torch.no_grad():
        before, after = model(x), model(changed)
        close(before[:1], model(x[:1]), 1e-6)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.allclose(before[1], after[1], atol=1e-3)


def test_aim_masks_drop_the_temporal_and_the_joint_branch_of_a_clip() -> None:
    model, spatial = aim(), aim(AIMOptions(adapters=("spatial",)))
    spatial.load_state_dict({k: v for k, v in model.state_dict().items() if k in spatial.state_dict()})
    joint = aim(AIMOptions(adapters=("spatial", "joint")))
    joint.load_state_dict({k: v for k, v in model.state_dict().items() if k in joint.state_dict()})
    x = clips(model, count=3)
    masks = torch.ones(3, 4, 2)
    masks[1] = 0
    masks[2, :, 0] = 0
    with torch.no_grad():
        out = model(x, {"drop_path": masks})
        for i, expected in enumerate((model, spatial, joint)):
            close(out[i], expected(x)[i], 1e-6)


@pytest.mark.parametrize("kept", [1, 2])
def test_video_swin_masks_drop_the_branches_of_a_clip_in_a_block(kept: int) -> None:
    """Kept are both branches of one block and the attention of the last: as if the others' last layers were zero."""
    model, bare = video_swin(), video_swin()
    blocks = [block for stage in bare.backbone.layers for block in stage.blocks]  # type: ignore[union-attr]
    for i in set(range(4)) - {kept}:
        for layer in (blocks[i].mlp.fc2, blocks[i].attn.proj) if i < 3 else (blocks[i].mlp.fc2,):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    masks = torch.ones(2, 4, 2)
    masks[1] = 0
    masks[1, kept] = 1
    masks[1, 3, 0] = 1
    x = clips(model)
    with torch.no_grad():
        out = model(x, {"drop_path": masks})
        close(out[0], model(x)[0], 1e-6)
        close(out[1], bare(x)[1], 1e-6)


@pytest.mark.parametrize("make", [aim, video_swin])
def test_random_masks_of_two_branches(make: Make) -> None:
    masks = make().random_masks
    assert masks["head_dropout"].shape == (64,) and (masks["head_dropout"] == 0.5).all()
    expected = torch.linspace(0, 0.2, 4, dtype=torch.float64)
    assert masks["drop_path"].shape == (4, 2)
    torch.testing.assert_close(masks["drop_path"], expected[:, None].expand(4, 2))


def counts(model: nn.Module) -> tuple[int, int]:
    return (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def test_parameter_counts_of_the_paper() -> None:
    tower = ImageTower(SwinGeometry(), {})
    with torch.device("meta"):
        assert counts(AIMSwin(tower, 400, 32, AIMOptions())) == (95_927_276, 9_179_956)
        assert counts(AIMSwin(tower, 400, 32, AIMOptions(shipped_freezing=True))) == (95_927_276, 9_172_080)
        assert counts(VideoSwin(tower, 400, 32, VideoSwinOptions())) == (88_048_984,) * 2
        assert counts(VideoSwin(tower, 174, 32, VideoSwinOptions(temporal_window=16))) == (88_834_038,) * 2


def test_official_names_and_shapes() -> None:
    model = aim()
    shapes = {name.removeprefix("backbone."): tuple(p.shape) for name, p in model.state_dict().items()}
    assert {name: shapes[name] for name in shapes if name.startswith(("patch_embed", "layers.0."))} == OFFICIAL_AIM
    others = {name for name in shapes if not name.startswith(("patch_embed", "layers."))}
    assert others == {"norm.weight", "norm.bias", "cls_head.fc_cls.weight", "cls_head.fc_cls.bias"}
    assert not any(name.startswith("layers.1.downsample") for name in shapes)
    plain = {name: p.shape for name, p in video_swin(window=16).backbone.state_dict().items()}
    assert set(plain) == {n for n in shapes if "Adapter" not in n and "temporal" not in n and "cls_head" not in n}
    assert plain["layers.1.blocks.0.attn.relative_position_bias_table"] == (31 * 169, 2)


@pytest.mark.parametrize("shipped", [False, True])
def test_trained_names(shipped: bool) -> None:
    model = aim(AIMOptions(shipped_freezing=shipped))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {n for n in model.state_dict() if "_Adapter" in n or n.startswith("cls_head")}
    if not shipped:
        expected |= {f"backbone.layers.{i}.blocks.0.attn.temporal_position_bias_table" for i in (0, 1)}
        expected |= {"backbone.norm.weight", "backbone.norm.bias"}
    assert trained == expected


def test_positions_count_the_blocks_of_all_stages() -> None:
    names = aim(AIMOptions(positions=(1, 2))).state_dict()
    with_adapters = {match[1] for name in names if (match := re.search(r"layers\.(.*)\.S_Adapter2.D_fc1.bias", name))}
    assert with_adapters == {"0.blocks.1", "1.blocks.0"}
    assert sum("T_Adapter.D_fc1.bias" in name for name in names) == 1  # block 1 is shifted


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_optimizer_groups_follow_the_longest_key(rate: float) -> None:
    model = video_swin()
    settings = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in model.optimizer_groups(0.05, rate)
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            expected = (1.0, 0.0)
        elif name.startswith("cls_head"):
            expected = (1.0, 0.05)
        else:
            expected = (rate, 0.0 if rate == 1 and "norm" in name else 0.05)
        assert settings[id(parameter)] == expected, name


@pytest.mark.parametrize("make", [aim, video_swin])
def test_bf16_computes_and_trains(make: Make) -> None:
    model = make()
    x = clips(model)
    with torch.no_grad():
        exact = model(x)
    model.set_compute_dtype(torch.bfloat16)
    out = model(x.bfloat16())
    assert out.dtype == torch.float32
    close(out.detach(), exact, 0.05)
    out.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_adapters_wake_up_from_zero() -> None:
    model = AIMSwin(ImageTower(SMALL, {}), 5, FRAMES, AIMOptions())
    F.cross_entropy(model(clips(model)), torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        if "D_fc2.weight" in name:
            assert parameter.abs().max() == 0 and parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (AIMOptions(temporal_adapters=2), "model.temporal_adapters = 2"),
        (AIMOptions(temporal_weights="text"), "model.temporal_weights = 'text'"),
        (AIMOptions(drop_path_axis="official"), "model.drop_path_axis = 'official'"),
        (AIMOptions(adapter_scale=1.0), "model.adapter_scale = 1.0"),
    ],
)
def test_options_of_other_backbones_are_refused(options: AIMOptions, said: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(said)} is not for Swin"):
        AIMSwin(ImageTower(SMALL, {}), 5, FRAMES, options)


def test_shapes_that_do_not_fit_are_refused() -> None:
    tower = ImageTower(SMALL, {})
    with pytest.raises(ValueError, match=r"num_frames = 7: .* in pairs"):
        AIMSwin(tower, 5, 7, AIMOptions())
    with pytest.raises(ValueError, match=r"num_frames = 0: .* in pairs"):
        VideoSwin(tower, 5, 0, VideoSwinOptions())
    with pytest.raises(ValueError, match="temporal_window = 8 does not divide"):
        VideoSwin(tower, 5, 24, VideoSwinOptions())
    with pytest.raises(ValueError, match="image size of 64 gives 16 tokens"):
        AIMSwin(ImageTower(SwinGeometry(width=32, image_size=64), {}), 5, 8, AIMOptions())
    with pytest.raises(ValueError, match=r"image size of 56 gives 3.5 tokens a side at stage 2"):
        AIMSwin(ImageTower(SwinGeometry(width=32, image_size=56), {}), 5, 8, AIMOptions())
    with pytest.raises(ValueError, match="do not fit the model"):
        aim()(torch.zeros(1, FRAMES + 2, 3, 56, 56))
    for wrong in ({"drop_path": 1.0}, {"head_dropout": -0.1}, {"temporal_window": 0}):
        with pytest.raises(ValueError, match=f"model.{next(iter(wrong))} = "):
            VideoSwinOptions(**wrong)  # type: ignore[arg-type]


def test_inflating_nothing_is_nothing() -> None:
    assert inflate({}) == {}
