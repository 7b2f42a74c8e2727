"""PromptCLIP: the published computation, gradients through the frozen text tower alone, candidates, any classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
from model import checkpoints, image_text
from model.flops import WithoutData, count_cost
from model.geometry import CLIPGeometry, ImageTower
from model.methods import create
from model.methods.prompt_clip import NO_CHANCE, PromptCLIP, PromptCLIPOptions
from model.parameters import count_parameters
from model.video import VideoModel
from pipelines.plan import Turn, draw_masks
from tests import official_files
from tests.golden import load_golden_on_clip
from tests.official_files import filled
from tests.towers import BOTH, both_towers
from train.loss import clip_loss

NAMES = ["archery", "brush hairs", "climb stairs", "draw sword", "wave"]
B16 = CLIPGeometry(768, 12, 12, 16, 224, True, (0.5,) * 3, (0.5,) * 3, embed_dim=512)  # type: ignore[arg-type]


def make(names: list[str] | None = NAMES, frames: int = 4, **options: object) -> PromptCLIP:
    tower = both_towers()
    torch.manual_seed(1)
    made = create(
        "prompt_clip",
        tower,
        num_classes=None,
        num_frames=frames,
        options=PromptCLIPOptions(**options),  # type: ignore[arg-type]
    )
    assert isinstance(made, PromptCLIP)
    if names is not None:
        made.name_classes(names)
    return made


def clips(count: int = 2, frames: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, frames, 32, 32, 3), dtype=torch.uint8, generator=generator)


def plain_blocks(x_LMD: Tensor, state: dict[str, Tensor], stack: str, causal: bool) -> Tensor:
    """Blocks as published, of PyTorch's own layers: sequence first, masked by numbers."""
    width = x_LMD.shape[2]
    mask = torch.full((len(x_LMD), len(x_LMD)), float("-inf")).triu(1) if causal else None
    for i in range(sum(f"{stack}.resblocks.{i}.ln_1.weight" in state for i in range(99))):
        part = {
            k.removeprefix(f"{stack}.resblocks.{i}."): v for k, v in state.items() if f"{stack}.resblocks.{i}." in k
        }
        attention = nn.MultiheadAttention(width, width // 64)
        attention.load_state_dict({k.removeprefix("attn."): v for k, v in part.items() if k.startswith("attn.")})
        y = F.layer_norm(x_LMD, (width,), part["ln_1.weight"], part["ln_1.bias"])
        x_LMD = x_LMD + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = F.layer_norm(x_LMD, (width,), part["ln_2.weight"], part["ln_2.bias"])
        y = F.linear(y, part["mlp.c_fc.weight"], part["mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x_LMD = x_LMD + F.linear(y, part["mlp.c_proj.weight"], part["mlp.c_proj.bias"])
    return x_LMD


def published(features_BTE: Tensor, tokens: list[list[int]], state: dict[str, Tensor], around: int) -> Tensor:
    """The whole of it by the official names, places after the end included."""
    words, table = state["clipmodel.token_embedding.weight"], state["embedding.weight"]
    x_CLD, ends = table.repeat(len(tokens), 1, 1), []
    for row, (start, *name, end) in enumerate(tokens):
        x_CLD[row, 0] = words[start]
        for place, token in enumerate(name):
            x_CLD[row, 1 + around + place] = words[token]
        ends.append(1 + 2 * around + len(name))
        x_CLD[row, ends[-1]] = words[end]
    x_CLD = x_CLD + state["clipmodel.positional_embedding"]
    x_CLD = plain_blocks(x_CLD.transpose(0, 1), state, "clipmodel.transformer", True).transpose(0, 1)
    norm = (state["clipmodel.ln_final.weight"], state["clipmodel.ln_final.bias"])
    last = F.layer_norm(x_CLD, x_CLD.shape[-1:], *norm)[torch.arange(len(x_CLD)), ends]
    texts = F.normalize(last @ state["clipmodel.text_projection"], dim=-1)
    x_TBE = (features_BTE + state["temporalEmbedding.weight"]).transpose(0, 1)
    videos = F.normalize(plain_blocks(x_TBE, state, "temporalModelling", False).mean(0), dim=-1)
    return videos @ texts.T / 0.07


def test_it_computes_what_is_published(tmp_path: Path) -> None:
    """From a file under the official names, through `model.load`, on features and on clips."""
    state = filled(official_files.efficient_prompt(vocabulary=49408))
    official_files.save_file(state, tmp_path / "official.safetensors")
    checkpoints.write_folder(checkpoints.convert(tmp_path / "official.safetensors"), tmp_path / "ours")
    loaded = model.load(tmp_path / "ours", class_names=NAMES, prefix=3, postfix=3)
    features = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    prompts = loaded.class_prompts
    tokens = [row[taken].tolist() for row, taken in zip(prompts.tokens, prompts.taken, strict=True)]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(features), published(features, tokens, state, 3), rtol=1e-5, atol=1e-5)
        of_clips = loaded(clips())
        torch.testing.assert_close(of_clips, loaded(loaded.stem(clips())))
        torch.testing.assert_close(of_clips, loaded(loaded.prepare(clips())))
        nameless = model.load(tmp_path / "ours")
        assert nameless(features).shape == (2, 64)
        torch.testing.assert_close(nameless(features), loaded.embed(features))
    assert model.load(tmp_path / "ours", num_frames=8)(features.repeat(1, 2, 1)).shape == (2, 64)
    assert loaded.options.temporal_layers == 2 and loaded.num_frames == 4
    with pytest.raises(ValueError, match="unknown setting 'temporal_layers'"):
        model.load(tmp_path / "ours", temporal_layers=1)


def test_a_file_without_temporal_blocks_is_of_a_blind_model(tmp_path: Path) -> None:
    blind = official_files.efficient_prompt(temporal_layers=0)
    with pytest.raises(ValueError, match=r"temporalEmbedding\.weight is there and no temporalModelling"):
        checkpoints.convert(official_files.saved(blind, tmp_path / "a.safetensors"))
    del blind["temporalEmbedding.weight"]
    converted = checkpoints.convert(official_files.saved(blind, tmp_path / "b.safetensors"))
    assert converted.description["options"]["temporal_layers"] == 0 and converted.assumed["num_frames"] == 16


def test_parity_with_the_published_model(tmp_path: Path) -> None:
    state, features, expected, facts = load_golden_on_clip("efficient_prompt_2l")
    official_files.save_file(state, tmp_path / "official.safetensors")
    converted = checkpoints.convert(tmp_path / "official.safetensors")
    checkpoints.write_folder(converted, tmp_path / "ours")
    loaded = model.load(tmp_path / "ours", class_names=json.loads(facts["note"]))
    with torch.inference_mode():
        off = (loaded(features) - expected).abs().max() / expected.abs().max()
    assert off < 1e-5
    assert count_parameters(loaded)[1] == facts["trainable"] == 6_352_384
    entry = checkpoints.FORMATS["efficient_prompt"]
    trained = {checkpoints.official.official_name(entry, n) for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == set(facts["trainable_names"])


def test_counts_are_the_published_ones() -> None:
    counts = []
    for layers in (1, 2):
        with WithoutData():
            options = PromptCLIPOptions(temporal_layers=layers)
            counts.append(create("prompt_clip", ImageTower(B16, {}), num_classes=None, num_frames=16, options=options))
    assert [count_parameters(blank)[1] for blank in counts] == [3_200_000, 6_352_384]
    assert count_parameters(counts[1])[0] == 155_973_121


def test_gradients_reach_the_prompts_and_nothing_of_clip() -> None:
    trained = make(prefix=2, postfix=3).train()
    loss = F.cross_entropy(trained(clips()), torch.tensor([0, 3]))
    loss.backward()
    with_gradient = {name for name, p in trained.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {name for name, p in trained.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in with_gradient} == {"prompts", "temporalEmbedding", "temporalModelling"}
    rows = trained.backbone.prompts.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    # Names of one and of two tokens: place 4 is a vector after the one and a word of the other.
    assert rows == [1, 2, 4, 5, 6, 7]


def test_the_image_model_keeps_nothing_for_the_backward_pass() -> None:
    kept = []
    for layers in (2, 6):
        with WithoutData():
            tower = ImageTower(replace(BOTH, layers=layers), {})
            made = create("prompt_clip", tower, num_classes=None, num_frames=4)
        made.name_classes(NAMES)
        cost = count_cost(made, clips=3)
        kept.append(cost.kept_bytes)
        trunk = layers * 3 * 4 * 5 * (12 * 128**2 + 2 * 5 * 128) / 1e9
        assert cost.gmac > trunk and cost.training_gmac - cost.gmac < 3 * (cost.gmac - trunk)
    assert kept[0] == kept[1] > 0


def test_classes_are_encoded_again_only_when_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_text, "TEXTS_AT_ONCE", 5)
    evaluated, calls = make().eval(), []
    evaluated.backbone.text.register_forward_hook(lambda *call: calls.append(call))
    with torch.no_grad():
        first = evaluated(clips())
        assert torch.equal(evaluated(clips()), first) and len(calls) == 1
        evaluated.backbone.prompts.weight.add_(0.1)
        changed = evaluated(clips())
        assert not torch.equal(changed, first) and len(calls) == 2
        evaluated.set_compute_dtype(torch.bfloat16)
        torch.testing.assert_close(evaluated(clips()), changed, atol=0.3, rtol=0)
        assert len(calls) == 3
        evaluated.name_classes(["run"])
        assert evaluated(clips()).shape == (2, 1) and len(calls) == 4 and evaluated.num_classes == 1
        evaluated.name_classes([f"class {number}" for number in range(12)])
        assert evaluated.class_embeddings().shape == (12, 64) and len(calls) == 7
    evaluated.train()
    for _ in range(2):
        evaluated.class_embeddings()
    assert len(calls) == 9


def test_evaluation_and_training_give_the_same_logits() -> None:
    both = make()
    trained = both.train()(clips())
    with torch.no_grad():
        torch.testing.assert_close(both.eval()(clips()), trained)


def test_features_of_any_length_are_told_from_clips() -> None:
    made = make().eval()
    with torch.no_grad():
        features = made.stem(clips())
        assert features.shape == (2, 4, 64)
        half = made(features.half())
        torch.testing.assert_close(half, made(clips()), atol=0.02, rtol=0)
        assert made(features[:, :1]).shape == made(features.repeat(1, 3, 1)).shape == (2, 5)
        assert made.embed(features).norm(dim=1).tolist() == pytest.approx([1, 1])
        for wrong in (features[..., :32], features[:, :0]):
            with pytest.raises(ValueError, match=r"frame features of shape .* do not fit the model, which takes"):
                made(wrong)
        with pytest.raises(ValueError, match=r"set data\.num_frames"):
            made(clips(1, 3))


def test_order_matters_only_by_the_temporal_blocks() -> None:
    seeing, blind = make().eval(), make(temporal_layers=0).eval()
    assert count_parameters(blind)[1] == 77 * 64
    with torch.no_grad():
        nn.init.normal_(seeing.backbone.temporalEmbedding.weight, std=1.0)
        for made, differs in ((seeing, True), (blind, False)):
            there, back = made(clips()), made(clips().flip(1))
            assert ((there - back).abs().max() > 1e-3) == differs


def test_candidates_are_the_micro_batchs_classes_and_drawn_ones() -> None:
    names = [f"class {number}" for number in range(40)]
    made = make(names, num_candidates=8).train()
    probabilities = {name: p.numpy() for name, p in made.random_masks.items()}
    assert {name: p.shape for name, p in probabilities.items()} == {"candidates": (40, 16)}
    targets, chosen = torch.tensor([3, 17]), []
    for sample in range(12):
        drawn = draw_masks(5, [Turn(sample, 0), Turn(99, 0)], probabilities)
        logits = made(clips(), {**{n: torch.from_numpy(m) for n, m in drawn.items()}, "targets": targets})
        rows = (logits[0] != NO_CHANCE).nonzero().flatten().tolist()
        assert len(rows) == 8 and {3, 17} <= set(rows) and logits.shape == (2, 40)
        chosen.append(rows)
    counts = np.bincount(np.concatenate(chosen), minlength=40)
    assert counts.sum() == 96 and (counts > 0).sum() > 25 and np.delete(counts, [3, 17]).max() < 8  # 1.9 are expected
    everything = make(names).train()
    rows = chosen[-1]
    torch.testing.assert_close(logits[:, rows], everything(clips())[:, rows])
    expected = F.cross_entropy(logits[:, rows], torch.tensor([rows.index(3), rows.index(17)]))
    torch.testing.assert_close(clip_loss(logits, targets, multi_label=False), expected)
    with torch.no_grad():
        assert (made.eval()(clips()) > NO_CHANCE).all()


def test_candidates_that_cannot_be_are_refused() -> None:
    made = make(num_candidates=2).train()
    masks = {"candidates": torch.ones(3, 5, 16)}
    with pytest.raises(ValueError, match=r"num_candidates = 2 is less than the 3 clips of a micro-batch"):
        made(clips(3), {**masks, "targets": torch.tensor([0, 1, 2])})
    with pytest.raises(ValueError, match="for clips of one class each"):
        made(clips(3), {**masks, "targets": torch.zeros(3, 5)})
    assert make(num_candidates=5).random_masks == make().random_masks == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": -1}, "model.prefix = -1; allowed is 0 or more"),
        ({"temperature": 0.0}, "model.temperature = 0.0; allowed is more than 0"),
        ({"template": "no place"}, "model.template"),
        ({"prefix": 40, "postfix": 40}, "allowed is up to 74 together, such as 24 and 24"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make(**options)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_names_are_needed_and_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"a": "archery", "b": "wave"}')
    plain, mapped = make(["archery", "wave"]).eval(), make(["a", "b"], class_texts=str(tmp_path / "names.json")).eval()
    unnamed: VideoModel = create("prompt_clip", both_towers(), num_classes=3, num_frames=4)
    with torch.no_grad():
        assert torch.equal(plain(clips()), mapped(clips()))
        with pytest.raises(ValueError, match="has 3 classes and no names for them"):
            unnamed(clips())


def test_its_cost_counts_the_texts() -> None:
    few, many = (count_cost(make(NAMES * times)) for times in (1, 2))
    places, layers, width = 36, 2, 64
    text = 5 * (layers * places * (12 * width**2 + 2 * places * width) + width * width) + 5 * width
    assert round((many.gmac - few.gmac) * 1e9) == text
