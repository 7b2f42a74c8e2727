"""Every way of computing a step computes the same step; what a way saves is counted, and what cannot be is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import speed
from model.flops import count_cost
from model.geometry import ImageTower, SwinGeometry, ViTGeometry
from model.methods import METHODS, create
from model.speed import SpeedOptions, call_block, compiles, describe_speed, speed_up
from model.video import VideoModel
from model.vit import Attention
from tests.towers import CLIP, tower_for

CPU = torch.device("cpu")
TRAINED = [name for name, entry in METHODS.items() if entry.trains]
SAME_BLOCKS = ("finetuned", "frozen", "prompt_clip", "vpt")
"""Methods whose blocks are those of others too."""


def make(method: str = "aim", **options: Any) -> VideoModel:
    """A small model of a method, every adapter away from its start."""
    image_tower = tower_for(method)
    torch.manual_seed(0)
    model = create(method, image_tower, num_classes=5, num_frames=4, options=METHODS[method].options(**options))
    model.name_classes(["a", "b", "c", "d", "e"])
    for name, parameter in model.named_parameters():
        if "Adapter" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def inputs(model: VideoModel) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    size = model.geometry.image_size
    frames = torch.randint(0, 256, (2, model.num_frames, size, size, 3), dtype=torch.uint8, generator=generator)
    masks = {
        name: (torch.rand((2, *p.shape), generator=generator) > 0.3) / 0.7 for name, p in model.random_masks.items()
    }
    return frames, masks


def step(model: VideoModel) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients, and how many bytes autograd kept between the passes."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(*inputs(model))
    model.zero_grad()
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


def assert_same_step(ours: VideoModel, plain: VideoModel, tolerance: float) -> None:
    logits, gradients, _ = step(ours)
    expected, expected_gradients, _ = step(plain)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in gradients.items():
        largest = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=tolerance, atol=tolerance * largest, msg=name
        )


@pytest.mark.parametrize("method", [name for name in TRAINED if name not in SAME_BLOCKS])
def test_every_methods_block_compiles_whole_and_computes_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph break would be an error. All of the compiler runs but for the making of kernels, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    compiled, plain = make(method), make(method)
    speed_up(compiled, SpeedOptions(compile="on"), CPU)
    assert_same_step(compiled, plain, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("method", ["aim", "video_swin"])
def test_a_swin_of_four_stages_trains_and_evaluates_compiled(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More forms of one block than the compiler keeps by itself; one more would end the run."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    geometry = SwinGeometry(width=16, depths=(2, 2, 2, 2), heads=(1, 1, 2, 2), window=2, image_size=64)
    model = create(method, ImageTower(geometry, {}), num_classes=3, num_frames=4)
    speed_up(model, SpeedOptions(compile="on"), CPU)
    torch._dynamo.utils.counters.clear()
    step(model)
    with torch.no_grad():
        model(inputs(model)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 8


def test_blocks_of_a_kind_share_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    geometry = ViTGeometry(64, 6, 1, 16, 32, True, (0.5,) * 3, (0.5,) * 3)
    deep = create("aim", ImageTower(geometry, {}), num_classes=3, num_frames=2)
    speed_up(deep, SpeedOptions(compile="on"), CPU)
    torch._dynamo.utils.counters.clear()
    step(deep)
    step(deep)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("method", TRAINED)
def test_checkpointed_blocks_give_the_same_bits_and_keep_less(method: str) -> None:
    checkpointed, plain = make(method), make(method)
    speed_up(checkpointed, SpeedOptions(checkpoint_blocks=speed.ALL_BLOCKS), CPU)
    assert_same_step(checkpointed, plain, 0.0)
    if method != "frozen":  # which keeps nothing of its blocks anyway
        assert step(checkpointed)[2] < 0.7 * step(plain)[2]


def test_some_blocks_are_checkpointed() -> None:
    kept = []
    for blocks in (0, 1, 3):
        model = make()
        speed_up(model, SpeedOptions(checkpoint_blocks=blocks), CPU)
        kept.append(step(model)[2])
    assert kept[0] > kept[1] > kept[2]


def test_nothing_is_computed_twice_in_evaluation() -> None:
    calls = []
    model = make()
    speed_up(model, SpeedOptions(checkpoint_blocks=-1), CPU)
    model.blocks[0].register_forward_hook(lambda *call: calls.append(call))
    with torch.no_grad():
        model(inputs(model)[0])
    assert len(calls) == 1


@pytest.mark.parametrize("method", ["aim", "timesformer", "timesformer_clip", "finetuned"])
def test_the_attention_asked_for_reaches_every_layer(method: str) -> None:
    model = make(method)
    speed_up(model, SpeedOptions(attention="sdpa"), CPU)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(layers) >= 3 and {layer.attention_backend for layer in layers} == {"sdpa"}


def test_fp8_takes_the_frozen_weights_alone() -> None:
    model, plain = make(), make()
    for each in (model, plain):
        each.set_compute_dtype(torch.bfloat16)
    speed_up(model, SpeedOptions(fp8=True), CPU)
    for block in model.blocks:
        parts: Any = block
        assert (
            parts.attn.in_proj_fp8 is not None
            and parts.mlp.c_fc.fp8 is not None
            and parts.attn.out_proj.fp8 is not None
        )
        assert parts.S_Adapter.D_fc1.fp8 is None
    assert model.state_dict().keys() == plain.state_dict().keys()
    logits, gradients, _ = step(model)
    expected, expected_gradients, _ = step(plain)
    assert 0 < (logits - expected).abs().max() < 0.2 * expected.abs().max()
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(gradient.flatten(), expected_gradients[name].flatten(), dim=0) > 0.9, name


def test_gradients_stop_above_the_lowest_adapter() -> None:
    """With the temporal embedding at the input all blocks are on their way; without, none below the first adapter."""
    needed: dict[str, list[bool]] = {}
    for place in ("input", "adapters"):
        model = make(positions="top 1", temporal_embedding=place)
        needed[place] = seen = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, given, out, seen=seen: seen.append(out.requires_grad))
        model(*inputs(model))
    assert needed["input"] == [True, True, True]
    assert needed["adapters"] == [False, False, True]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("aim", {}),
        ("aim", {"positions": "top 1"}),
        ("aim", {"positions": "top 2", "temporal_embedding": "adapters"}),
        ("aim", {"adapters": ("spatial",), "positions": "top 1"}),
        ("frozen", {}),
    ],
)
def test_the_model_goes_on_from_its_stem(method: str, options: dict[str, Any]) -> None:
    model = make(method, **options)
    frames, masks = inputs(model)
    expected = model(frames, masks)
    assert model.has_frozen_stem
    tokens = model.stem(frames)
    assert tokens.shape == (2, 4, CLIP.num_tokens, CLIP.width) and not tokens.requires_grad
    handle = model.backbone.conv1.register_forward_hook(lambda *call: pytest.fail("the stem was computed again"))
    torch.testing.assert_close(model(tokens, masks), expected, rtol=0, atol=0)
    handle.remove()


def test_models_that_train_throughout_have_no_stem() -> None:
    for method in ("finetuned", "timesformer", "timesformer_clip", "video_swin"):
        assert not make(method).has_frozen_stem
        with pytest.raises(ValueError, match=r"speed.cache_gb = 1: in this model all that computes trains"):
            speed_up(make(method), SpeedOptions(cache_gb=1), CPU)
    with pytest.raises(ValueError, match="do not fit the model"):
        make("finetuned")(torch.zeros(2, 4, CLIP.num_tokens, CLIP.width))


def test_one_recording_serves_all_calls_of_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recorder in place of CUDA's graphs."""
    recorded: list[tuple[Tensor, ...]] = []

    def record(shell: nn.Module, samples: tuple[Tensor, ...]) -> None:
        recorded.append(samples)
        plain = shell.forward
        shell.forward = lambda *given: plain(*given) + 1  # type: ignore[method-assign]

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    block = nn.Linear(4, 4)
    block.graphed = speed._Graphed(block)  # type: ignore[assignment]
    x = torch.randn(2, 4, requires_grad=True)
    for _ in range(2):
        torch.testing.assert_close(call_block(block, x), block(x) + 1)
    ((sample,),) = recorded
    assert sample.requires_grad and sample.data_ptr() != x.data_ptr()
    torch.testing.assert_close(call_block(block, x[:1]), block(x[:1]))
    with torch.no_grad():
        torch.testing.assert_close(call_block(block, x), block(x))
    assert block.state_dict().keys() == {"weight", "bias"}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"cuda_graphs": True}, {"compile": "on"}, {"compile": "on", "cuda_graphs": True}])
def test_a_gpu_computes_the_same_step_each_way(options: dict[str, Any]) -> None:
    device = torch.device("cuda")
    ways = []
    for chosen in ({"compile": "off"}, options):
        model = make()
        model.set_compute_dtype(torch.bfloat16)
        speed_up(model.to(device), SpeedOptions(**chosen), device)
        frames, masks = inputs(model)
        losses = []
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        given = frames.to(device), {n: m.to(device) for n, m in masks.items()}
        for _ in range(3):
            optimizer.zero_grad()
            for clips in (given[0], given[0].flip(0)):  # gradients of two micro-batches are added
                loss = model(clips, given[1]).square().mean()
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
        gradients = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        ways.append([*losses, *gradients])
    assert ways[1] == pytest.approx(ways[0], rel=0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash"}, r"speed.attention = 'flash'; allowed is auto, xformers, sdpa, short"),
        ({"compile": "yes"}, r"speed.compile = 'yes'; allowed is auto, on, off"),
        ({"checkpoint_blocks": -2}, r"speed.checkpoint_blocks = -2; allowed is 0 or more blocks, or -1 for all"),
        ({"cache_gb": -1.0}, r"speed.cache_gb = -1.0; allowed is 0 \(off\) or more"),
    ],
)
def test_impossible_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeedOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_blocks": 4}, "the model has 3 blocks; -1 means all"),
        ({"cuda_graphs": True}, "needs a CUDA device"),
        ({"fp8": True}, "bfloat16"),
        ({"attention": "short"}, "needs a CUDA device"),
    ],
)
def test_what_model_or_device_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speed_up(make(), SpeedOptions(**options), CPU)


def test_compilation_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compiles(SpeedOptions(), CPU) and compiles(SpeedOptions(), torch.device("cuda"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiles(SpeedOptions(), torch.device("cuda"))
    assert describe_speed(SpeedOptions(), torch.device("cuda")) == "blocks not compiled, for there is no gcc"
    with pytest.raises(ValueError, match="needs a compiler"):
        compiles(SpeedOptions(compile="on"), CPU)


def test_the_log_says_what_is_on() -> None:
    assert describe_speed(SpeedOptions(), CPU) == ""
    said = describe_speed(SpeedOptions(compile="on", checkpoint_blocks=-1, fp8=True), CPU)
    assert "compiled" in said and "all blocks" in said and "FP8" in said
    assert describe_speed(SpeedOptions(cache_gb=0.5), CPU) == "up to 0.5 GB of what the frozen part computes kept"


def test_a_model_costs_the_same_however_it_is_computed() -> None:
    model = make()
    before = count_cost(model)
    speed_up(model, SpeedOptions(checkpoint_blocks=-1), CPU)
    assert count_cost(model).gmac == before.gmac
