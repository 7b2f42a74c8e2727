"""The rules of the house, checked on every file that git tracks or would track.

A rule is a function from one file's source to its breaches, so that it can be shown a culprit too.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]

TOP_LEVEL = {
    *("pipelines", "model", "train", "tools", "tests"),
    *("README.md", "CHANGELOG.md", "LICENSE", "Makefile"),
    *("ds_config.json", "pyproject.toml", "requirements.lock"),
}

# Room: the rooms of ours that it may import, besides itself.
ROOMS: dict[str, set[str]] = {
    "pipelines": set(),
    "model": set(),
    "train": {"pipelines", "model"},
    "tools": {"pipelines", "model", "train"},
}

# Heavy dependency: the only files outside tests/ that may import it; all the rest runs without.
DOORS: dict[str, set[str]] = {
    "nvidia.dali": {"pipelines/dali.py"},
    "av": {
        *("pipelines/video.py", "pipelines/encode.py", "pipelines/colour.py"),
        *("tools/make_motion_videos.py", "tools/parts/bench_sources.py"),  # which write source videos
        *("tools/parts/bench_contenders.py", "tools/bench_packing.py"),  # rivals
    },
    "cv2": {
        *("pipelines/decode.py", "pipelines/colour.py"),
        *(
            "tools/parts/bench_contenders.py",
            "tools/bench_pipeline.py",
            "tools/parts/bench_checks.py",
            "tools/parts/bench_sources.py",
        ),
    },
    "open_clip": {"model/open_clip_models.py", "tools/pretrain_clip.py"},  # the tool pretrains with it
    "timm": {"model/timm_models.py"},
    "torchvision": {"pipelines/augment.py"},
    "triton": {"model/short_attention.py"},
    "xformers": {"model/attention.py"},
    "deepspeed": {"train/engine.py"},
    "fsspec": {"pipelines/remote.py"},
    "onnxruntime": {"model/graphs.py"},
    **{rival: {"tools/parts/bench_contenders.py"} for rival in ("decord", "torchcodec", "webdataset")},
}


def project_files() -> list[str]:
    """Files that git tracks or would add: the rules hold before a commit too."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return sorted(p for p in set(listed.split("\0")) if p and (ROOT / p).is_file())


def python_sources() -> dict[str, str]:
    """Path → text of the Python files in the rooms, tests left out."""
    return {
        path: (ROOT / path).read_text(encoding="utf-8")
        for path in project_files()
        if path.endswith(".py") and path.split("/")[0] in ROOMS
    }


def imported_modules(path: str, source: str) -> set[str]:
    """Dotted names that `source` imports anywhere; `from a import b` gives both `a` and `a.b`."""
    package = PurePosixPath(path).parent.parts
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            names.update(a.value for a in node.args[:1] if isinstance(a, ast.Constant))
    return names


def imports(modules: set[str], dependency: str) -> bool:
    return any(name == dependency or name.startswith(dependency + ".") for name in modules)


def called_name(call: ast.Call) -> str:
    """Last part of what is called: `load` for `torch.load(…)`."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def room_breaches(path: str, source: str) -> list[str]:
    room = path.split("/")[0]
    modules = imported_modules(path, source)
    closed = ROOMS.keys() - ROOMS[room] - {room} | {"tests"}
    return [f"{path} imports {other}" for other in sorted(closed) if imports(modules, other)]


def door_breaches(path: str, source: str) -> list[str]:
    modules = imported_modules(path, source)
    return [
        f"{path} imports {dependency}; only {', '.join(sorted(doors))} may"
        for dependency, doors in DOORS.items()
        if imports(modules, dependency) and path not in doors
    ]


def danger_breaches(path: str, source: str) -> list[str]:
    """Ways in which a file or an argument could run code: pickles and shells."""
    return [f"{path}:{line}: {what}" for line, what in sorted(dangers(path, source))]


def dangers(path: str, source: str) -> Iterator[tuple[int, str]]:
    modules = imported_modules(path, source)
    for pickler in ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"):
        if imports(modules, pickler):
            yield 0, f"imports {pickler}"
    if {"os.system", "os.popen", "torch.load"} & modules:
        yield 0, "imports os.system, os.popen or torch.load by name"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("os.system", "os.popen"):
            yield node.lineno, called
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if keywords.get("shell", "False") != "False":
            yield node.lineno, "shell=True"
        if keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, "allow_pickle=True"


@pytest.mark.parametrize("rule", [room_breaches, door_breaches, danger_breaches])
def test_sources_keep_the_rule(rule) -> None:
    sources = python_sources()
    assert sources, "no Python file found in the rooms"
    assert [breach for path, text in sources.items() for breach in rule(path, text)] == []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (room_breaches, "pipelines/a.py", "import model.heads"),
        (room_breaches, "pipelines/a.py", "def f():\n    from train import engine"),
        (room_breaches, "model/a.py", "from pipelines.plan import Plan"),
        (room_breaches, "model/a.py", "from ..pipelines import plan"),
        (room_breaches, "train/a.py", "import tools.make_shards"),
        (room_breaches, "tools/a.py", "from tests import videos"),
        (door_breaches, "pipelines/a.py", "from nvidia import dali"),
        (door_breaches, "pipelines/dali.py", "import av"),
        (door_breaches, "model/methods/a.py", "import xformers.ops as xops"),
        (door_breaches, "train/main.py", "import importlib\nimportlib.import_module('deepspeed')"),
        (door_breaches, "tools/a.py", "import open_clip"),
        (door_breaches, "pipelines/cache.py", "from fsspec.core import url_to_fs"),
        (danger_breaches, "train/a.py", "from pickle import loads"),
        (danger_breaches, "train/a.py", "import torch\ntorch.load('x')"),
        (danger_breaches, "train/a.py", "import torch\ntorch.load('x', weights_only=False)"),
        (danger_breaches, "train/a.py", "from torch import load"),
        (danger_breaches, "tools/a.py", "import subprocess\nsubprocess.run('ls', shell=True)"),
        (danger_breaches, "tools/a.py", "import os\nos.system('ls')"),
        (danger_breaches, "tools/a.py", "import numpy\nnumpy.load('x', allow_pickle=True)"),
    ],
)
def test_rule_catches(rule, path: str, source: str) -> None:
    assert len(rule(path, source)) == 1


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (room_breaches, "train/a.py", "import pipelines.plan\nfrom model import heads"),
        (room_breaches, "model/a.py", "from . import heads\nfrom .train_free import x"),
        (door_breaches, "model/attention.py", "import xformers.ops"),
        (door_breaches, "pipelines/a.py", "import average\nimport nvidia.nvimgcodec"),
        (danger_breaches, "train/a.py", "import torch\ntorch.load('x', weights_only=True)"),
    ],
)
def test_rule_lets_pass(rule, path: str, source: str) -> None:
    assert rule(path, source) == []


def test_top_level_is_fixed() -> None:
    entries = {path.split("/")[0] for path in project_files()}
    assert {entry for entry in entries if not entry.startswith(".")} - TOP_LEVEL == set()


def test_no_file_hides_a_standard_module() -> None:
    """A script's folder comes first on sys.path: `tools/profile.py` would break `import torch`."""
    paths = [PurePosixPath(p) for p in project_files() if p.endswith(".py")]
    assert [str(p) for p in paths if p.stem in sys.stdlib_module_names] == []


def test_every_program_starts_as_a_script_from_anywhere(tmp_path: Path) -> None:
    """With its own folder first on sys.path, as Python starts a script; in one process, for torch is slow to import."""
    programs = [ROOT / "train" / "main.py", *sorted((ROOT / "tools").glob("*.py"))]
    code = f"""
import contextlib, io, runpy, sys
for path in {[str(path) for path in programs]!r}:
    sys.path[0], sys.argv, shown = path.rpartition("/")[0], [path, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, None) and shown.getvalue().startswith("usage: "), (path, end.code, shown.getvalue())
        assert sys.path[0] == {str(ROOT)!r}, f"{{path}} leaves its own folder on sys.path"
    else:
        raise AssertionError(path)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_text_names_a_path_of_the_machine_it_was_written_on() -> None:
    culprit = re.compile(rb"(?<![\w.}-])/wor[k]/")  # the brackets keep this line from naming it
    contents = {path: (ROOT / path).read_bytes() for path in project_files()}
    texts = {path: content for path, content in contents.items() if b"\0" not in content}
    assert [path for path, text in texts.items() if culprit.search(text)] == []


def test_lock_names_no_address_and_hashes_everything() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    requirements = re.sub(r"\\\n", " ", lock).splitlines()
    requirements = [line for line in requirements if line.strip() and not line.lstrip().startswith("#")]
    assert [r for r in requirements if not re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", r)] == []


def test_lock_holds_every_direct_dependency_at_its_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = set(re.findall(r"^([\w.-]+)==(\S+)", lock, flags=re.MULTILINE))
    for requirement in project["project"]["dependencies"] + project["dependency-groups"]["dev"]:
        found = re.match(r"([\w.-]+)(==[^;\s]+)?", requirement)
        assert found, requirement
        name, pin = found[1].lower().replace("_", "-"), found[2]
        versions = {version for other, version in locked if other == name}
        assert (pin[2:] in versions) if pin else versions, f"{requirement} is not in the lock: make lock"
