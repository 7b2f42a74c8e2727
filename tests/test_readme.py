"""Every command in a fenced `bash` block of a README is run here, in order, or is named below with the reason why not.

Commands run in a folder of their own that looks like a fresh clone with a few small videos in `videos/`. Those named in
SMALLER get further arguments that shrink them; nothing else is changed. Python programs run within this process, for
starting each anew would take minutes; that they start as scripts is tested in tests/test_project.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from model.methods import METHODS
from tests.shell import call_program, shell_environment
from tests.videos import write_video
from train.resolve import DEEPSPEED_KEYS, SECTIONS

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", *(f"{room}/README.md" for room in ("pipelines", "model", "train", "tools", "tests")))

NOT_RUN = {
    "make demo": "its quick version is run by tests/tools/test_run_demo.py",
    "python tools/bench_pipeline.py": "tests/tools/test_bench_pipeline.py runs it with fewer, shorter clips",
    "python tools/bench_step.py --model tiny-clip --layers 4 --clips 32": "tests/tools/test_bench_step.py, fewer clips",
    "python tools/run_ablation.py ladder positions ratio --seeds 0,1,2": "test_run_ablation.py runs two rows",
    "python tools/gpu_report.py --out runs/gpu_report": "tests/tools/test_gpu_report.py runs its reduced form",
    "python tools/compare_methods.py --out runs/compare_methods": "tests/tools/test_compare_methods.py, two rows",
    **dict.fromkeys(
        (
            "python tools/extract_features.py data/my_videos data/my_features --name ViT-B-16-quickgelu "
            "--pretrained openai",
            "python train/main.py --recipe prompt_clip_k400 --set data.shards=data/my_features "
            "--set run.out=runs/prompts",
            "python tools/evaluate.py runs/prompts --shards data/other_classes",
        ),
        "CLIP's own weights need a network; test_extract_features.py and test_prompt_clip.py take the tiny CLIP",
    ),
    "python tools/few_shot.py prompt_clip_k400 --shards data/my_features --ways 5 --shots 5 --episodes 200": (
        "tests/tools/test_few_shot.py, smaller episodes"
    ),
    "python tools/retrieve.py runs/prompts --shards data/my_features": "tests/tools/test_retrieve.py",
    "python tools/localise.py runs/prompts --features data/long --proposals proposals.json --truth truth.json --subset "
    "validation": "tests/tools/test_localise.py",
    "make test": "is what runs this test",
    "make test 'ARGS=-k checkpoint'": "the same, of a part",
    **dict.fromkeys(
        (
            "deepspeed --num_gpus 8 train/main.py --recipe aim_b16_k400",
            "deepspeed --hostfile hostfile --master_addr node-0 train/main.py --recipe aim_b16_k400",
            "deepspeed --hostfile hostfile --no_ssh --node_rank 0 --master_addr node-0 train/main.py --recipe "
            "aim_b16_k400",
        ),
        "needs Kinetics-400 and GPUs; tests/train/test_loop.py starts two processes as two machines",
    ),
    "python tools/compare_runs.py runs/my_videos runs/prompts": "tests/tools/test_compare_runs.py",
    "deepspeed train/main.py --recipe my_videos --set model.name=tiny-clip --set model.pretrained=shapes --set "
    "ds.train_batch_size=8": "is what SMALLER makes of the command above it",
    "make setup": "ran before this test could",
    "source .venv/bin/activate": "the tests already run inside that environment",
}
TINY_MODEL = "--set model.name=tiny-clip --set model.pretrained=shapes "
TINY = TINY_MODEL + "--set ds.train_batch_size=4 "
SHORT = TINY + "--set schedule.epochs=1 --set schedule.warmup_epochs=0"
SMALLER = {
    "deepspeed train/main.py --recipe my_videos": SHORT,
    "deepspeed train/main.py --recipe my_videos --resume": SHORT,
    "python tools/profile_throughput.py --recipe my_videos --shards data/my_videos": TINY + "--rounds 1 --seconds 0.2",
    "python tools/evaluate.py train/recipes/zero_shot.toml --shards data/my_videos": TINY_MODEL,
    "python tools/view_clips.py data/my_videos --out clips.png": "--set model.name=tiny-clip",
}


def commands(text: str) -> list[str]:
    """The lines of the `bash` blocks, comments removed, continued lines joined."""
    found: list[str] = []
    inside = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("```"):
            inside = line.strip() == "```bash"
            continue
        words = shlex.split(line, comments=True) if inside else []
        if words:
            found.append(shlex.join(words))
    return found


def everything() -> list[str]:
    return [c for name in READMES if (ROOT / name).is_file() for c in commands((ROOT / name).read_text())]


def test_commands_are_found_and_tables_hold_nothing_else() -> None:
    documented = everything()
    assert documented
    assert commands("```bash\nmake a  # why\npython b.py \\\n  --c\n```\n```\nmake d\n```") == [
        "make a",
        "python b.py --c",
    ]
    assert not set(NOT_RUN) & set(SMALLER)
    stale = [command for command in SMALLER if command not in documented]
    stale += [command for command in NOT_RUN if command not in (*documented, "make setup", "make test")]
    assert not stale, stale


def execute(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in the working directory."""
    if program == "python":
        main = import_module(arguments[0].removesuffix(".py").replace("/", ".")).main
        return call_program(main, *arguments[1:])
    command = (program, *arguments)
    return subprocess.run(command, env=shell_environment(), capture_output=True, text=True, check=False)


def texts() -> Iterator[tuple[str, str]]:
    """Name and text of every README."""
    return ((name, (ROOT / name).read_text()) for name in READMES)


def test_every_program_is_in_the_table_and_every_file_that_is_named_exists() -> None:
    table = (ROOT / "tools/README.md").read_text()
    programs = {path.name for path in (ROOT / "tools").glob("*.py")}
    assert programs == set(re.findall(r"`python tools/(\w+\.py)", table))
    for name, text in texts():
        named = re.findall(r"`((?:pipelines|model|train|tools|tests)/[\w/.]+\.\w+)", text)
        missing = [path for path in named if not (ROOT / path).exists()]
        linked = re.findall(r"\]\(([^)#:]+)\)", text)
        missing += [path for path in linked if not (ROOT / name).parent.joinpath(path).exists()]
        assert not missing, f"{name} names {missing}"


def test_every_key_that_is_named_exists() -> None:
    options = {field for entry in METHODS.values() for field in vars(entry.options())}
    keys = {f"{section}.{key}" for section, kind in SECTIONS.items() for key in vars(kind())}
    keys |= {f"model.{key}" for key in options} | {f"ds.{key}" for key in DEEPSPEED_KEYS}
    for name, text in texts():
        named = set(re.findall(rf"(?<![\w./])(?:{'|'.join(SECTIONS)}|ds)\.[a-z_]+(?![\w/(.])", text))
        files = {"model.backbone"} | {
            f"{section}.{suffix}" for section in SECTIONS for suffix in ("py", "md", "load", "toml", "json")
        }
        assert named - keys <= files, f"{name} names {sorted(named - keys - files)}"


@pytest.mark.timeout(600)
def test_every_documented_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tools", "train", "model", "pipelines", "ds_config.json"):
        (tmp_path / name).symlink_to(ROOT / name)
    for i in range(12):
        folder = tmp_path / "videos" / ("jump" if i % 2 else "run")
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{i}.mp4", 20 + i)
    monkeypatch.chdir(tmp_path)
    for command in everything():
        if command in NOT_RUN:
            continue
        whole = f"{command} {SMALLER.get(command, '')}".strip()
        done = execute(*shlex.split(whole))
        assert done.returncode == 0, f"$ {whole}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "attention.png").is_file() and (tmp_path / "runs/my_videos/test/metrics.json").is_file()
    assert (tmp_path / "clips.png").is_file() and (tmp_path / "runs/my_videos/metrics.jsonl").is_file()
