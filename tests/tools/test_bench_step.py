"""The benchmark on a tiny model: it compares equals with equals, and what it says is complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.methods.aim import AIM
from model.speed import ALL_BLOCKS, SpeedOptions
from tests.shell import call_program, shell_environment
from tools import bench_step
from tools.bench_step import (
    BASELINE,
    PARTS,
    TOLERANCE,
    USUAL_CPU,
    USUAL_CUDA,
    Contender,
    PaperBlock,
    check,
    check_variant,
    deviation,
    interleaved,
    make_inputs,
    rates,
    reference_model,
    speed_options,
    summarise,
)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/bench_step.py"), *map(str, arguments)]
    environment = shell_environment(OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", env=environment)


@pytest.fixture(scope="module")
def reference() -> AIM:
    return reference_model("tiny-clip", 2, 4)


def test_a_run_ends_with_one_line_of_json_behind_a_table(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    variants = ("ours", "ours+checkpoint", "ours+fp8", "ours+short")
    run = bench("--quick", "--layers", "1", "--frames", "4", "--variants", *variants, "--json", file)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result == json.loads(file.read_text(encoding="utf-8"))
    assert list(result["variants"]) == [BASELINE, "ours", "ours+checkpoint", "ours+fp8"]
    for facts in result["variants"].values():
        for what in ("forward", "forward_backward", "step"):
            assert 0 < facts[what]["lowest"] <= facts[what]["ms"] <= facts[what]["highest"]
        assert facts["forward"]["ms"] < facts["forward_backward"]["ms"]
        assert facts["clips_per_second"] == pytest.approx(2e3 / facts["step"]["ms"], abs=0.006)
        assert facts["mfu"] is None
    assert result["variants"][BASELINE]["step"]["ratio"] == 1
    assert set(result["equality"]) == {"ours", "ours+checkpoint"}
    assert max(result["equality"]["ours"].values()) < TOLERANCE
    assert "CUDA" in result["left_out"]["ours+short"] and "CUDA" in result["attention_left_out"]["xformers"]
    assert result["temporal_attention"]["sdpa"]["forward"]["gb_per_second"] > 0
    kept = {name: facts["memory_bytes"] for name, facts in result["variants"].items()}
    assert 4 * kept["ours+checkpoint"] < kept["ours"] < kept[BASELINE]
    settings = {"model": "tiny-clip", "layers": 1, "frames": 4, "clips": 2, "dtype": "bf16", "rounds": 2}
    assert result["settings"].items() >= settings.items()
    assert result["hardware"]["gpu"] is None and result["versions"]["torch"] == torch.__version__.partition("+")[0]
    for line in ("paper  ", "ours+fp8  ", "sdpa  ", "ours+short: left out: ", "MiB: bytes that autograd keeps"):
        assert line in run.stdout


def test_an_unknown_variant_is_one_line() -> None:
    run = call_program(bench_step.main, "--variants", "ours+warp")
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: --variants ours+warp: allowed are paper, paper+amp, and ours")


def test_numbers_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--clips", "0"])
    with pytest.raises(ValueError, match="--clips 0: allowed is 1 or more"):
        bench_step.main()


@pytest.mark.parametrize("name", ["ours+sdpa+xformers", "ours+compile+compile", "paper+compile", "theirs", "ours+"])
def test_variants_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"--variants .* allowed are"):
        check_variant(name)


def test_usual_variants_are_what_their_names_say() -> None:
    for name in (*USUAL_CPU, *USUAL_CUDA):
        check_variant(name)
    assert all(any(f"+{part}" in name for name in USUAL_CUDA) for part in PARTS)
    both = SpeedOptions(compile="on", checkpoint_blocks=ALL_BLOCKS)
    assert speed_options("ours+compile+checkpoint") == both
    assert speed_options("ours") == SpeedOptions(compile="off")


@pytest.mark.parametrize("options", [("tiny-clip", 99, 4), ("swin_base_patch4_window7_224", 1, 4)])
def test_models_that_cannot_serve_are_named(options: tuple[str, int, int]) -> None:
    with pytest.raises(ValueError, match=r"--layers 99: tiny-clip has|allowed are ViTs"):
        reference_model(*options)


@pytest.mark.parametrize("name", ["tiny-clip", "vit_base_patch16_224"])
def test_the_baseline_is_the_block_that_is_trained(name: str) -> None:
    """OpenAI's activation and erf GELU, several clips, some branches dropped."""
    model = reference_model(name, 2, 2)
    assert (make_inputs(model, 3, torch.float32, CPU).masks["drop_path"] == 0).any()
    left_out: dict[str, str] = {}
    found = check(model, [BASELINE, "ours"], 3, CPU, left_out)
    assert not left_out and set(found) == {"ours"} and max(found["ours"].values()) < TOLERANCE


@pytest.mark.parametrize("where", ["attn.in_proj_weight", "mlp.c_proj.weight", "T_Adapter.D_fc1.weight", "ln_2.bias"])
def test_another_weight_is_refused(reference: AIM, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = bench_step.build

    def with_another(model: AIM, variant: str, *others: Any) -> nn.Module:
        built = build(model, variant, *others)
        if variant != BASELINE:
            with torch.no_grad():
                built.blocks[0].get_parameter(where).view(-1)[0] += 0.1
        return built

    monkeypatch.setattr(bench_step, "build", with_another)
    left_out: dict[str, str] = {}
    check(reference, [BASELINE, "ours"], 2, CPU, left_out)
    assert left_out["ours"].startswith("refused: in float32")


def test_gradients_that_are_wrong_or_missing_are_far_off() -> None:
    wanted = {"output": torch.tensor([1.0, -4.0]), "weight": torch.tensor([2.0])}
    near = {"output": torch.tensor([1.0, -4.4]), "weight": torch.tensor([2.0])}
    assert deviation(near, wanted) == {"output": pytest.approx(0.1), "gradients": 0}
    infinitely = {"output": 0, "gradients": float("inf")}
    assert deviation({"output": wanted["output"]}, wanted) == infinitely
    assert deviation({**wanted, "weight": torch.tensor([float("nan")])}, wanted) == infinitely


def test_in_bfloat16_the_baseline_is_as_far_from_the_truth_as_ours(reference: AIM) -> None:
    """Neither side is timed with less precision than the other; and only what trains has gradients."""
    exact = Contender(reference, BASELINE, torch.float32, make_inputs(reference, 2, torch.float32, CPU)).results()
    off: dict[str, float] = {}
    for name in (BASELINE, "paper+amp", "ours"):
        contender = Contender(reference, name, torch.bfloat16, make_inputs(reference, 2, torch.bfloat16, CPU))
        results: dict[str, Tensor] = contender.results()
        assert set(results) == set(exact)
        off[name] = deviation(results, exact)["output"]
    assert min(off.values()) > 0.001 and max(off.values()) < 3 * min(off.values()) < 0.1


def test_the_whole_step_trains_the_same_weights(reference: AIM) -> None:
    inputs = make_inputs(reference, 1, torch.float32, CPU)
    moved, losses = {}, {}
    for name in (BASELINE, "ours"):
        contender = Contender(reference, name, torch.float32, inputs)
        before = {key: value.clone() for key, value in contender.model.state_dict().items()}
        losses[name] = contender.loss().item()
        contender.step()
        moved[name] = {key for key, value in contender.model.state_dict().items() if not value.equal(before[key])}
    assert losses[BASELINE] == pytest.approx(losses["ours"], rel=1e-5)
    assert moved[BASELINE] == moved["ours"] > {"backbone.temporal_embedding", "cls_head.fc_cls.weight"}
    assert isinstance(contender.model.blocks[0], nn.Module) and not isinstance(contender.model.blocks[0], PaperBlock)


def test_rounds_take_turns_and_ratios_are_the_rounds_own() -> None:
    order: list[str] = []

    def subject(name: str, seconds: list[float]) -> Any:
        def sample() -> dict[str, float]:
            order.append(name)
            return {"step": seconds[order.count(name) - 1]}

        return sample

    samples = interleaved({"a": subject("a", [1.0, 2.0, 10.0]), "b": subject("b", [0.5, 1.0, 2.0])}, 3)
    assert "".join(order) == "abbaab"
    step = summarise(samples, "a")["b"]["step"]
    assert step == {"ms": 1000, "lowest": 500, "highest": 2000, "ratio": 2}


def test_rates_come_from_the_count(reference: AIM) -> None:
    cost = bench_step.count_cost(reference)
    found = rates(cost, 4, 10.0, 1e12)
    assert found["clips_per_second"] == 400
    assert found["tflops"] == pytest.approx(2 * 4 * cost.training_gmac / 10, abs=1e-3)
    assert found["mfu"] == pytest.approx(found["tflops"], abs=1e-3)


@pytest.mark.gpu
def test_every_usual_variant_runs_on_a_gpu() -> None:
    run = bench("--quick", "--layers", "2", "--frames", "8")
    assert run.returncode == 0, run.stderr + run.stdout
    result = json.loads(run.stdout.splitlines()[-1])
    assert set(result["variants"]) == {BASELINE, *USUAL_CUDA} - set(result["left_out"])
    assert result["left_out"].keys() <= {"ours+xformers", "ours+compile+fp8"}
    assert "flash" in result["temporal_attention"]
