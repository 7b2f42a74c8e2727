"""Files of strangers at the doors where they come in: each is refused in one line, by ValueError or OSError; nothing in
it is executed, nothing outside its folder is written, no memory or time is spent that its size does not explain.

`POISONS` is the table: a door, what makes the file, and words of the refusal. Then bytes are flipped at random in good
checkpoints and sets: either they are refused, or they give the bits that they gave before.

    STRESS=1 pytest -s tests/stress/test_poison.py      (50 flips a kind by default, 3000 with STRESS=1)
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from model.text import read_class_texts
from model.weight_files import read_tensors
from pipelines.annotations import list_videos
from pipelines.shards import ShardSet, index_path_of, write_manifest
from pipelines.subset import read_episodes
from tests.sets import make_set
from train.build import build_model
from train.checkpoint import newest_checkpoint, read_checkpoint, resume, save_checkpoint
from train.config import Batch, Config, ModelConfig
from train.localisation import read_segments, read_truth
from train.resolve import load_config

FLIPS = int(os.environ.get("STRESS_FLIPS", "3000" if os.environ.get("STRESS") == "1" else "50"))
SEED = int(os.environ.get("STRESS_SEED", "0"))
RUN = {"optimizer.lr": 1e-3}
NESTED = "[" * 100_000
U8 = '{"a":{"dtype":"U8","shape":[8],"data_offsets":[%d,%d]}}'
MOST_SECONDS, MOST_BYTES = 5.0, 600 * 2**20
State = dict[str, torch.Tensor]


class Canary:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


@cache
def small_model() -> Any:
    """One for all, for what is refused is not learned."""
    return build_model(ModelConfig(name="tiny-clip", pretrained="none"), num_classes=2, num_frames=2, seed=0)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one checkpoint and a packed set."""
    folder = tmp_path_factory.mktemp("good")
    model = small_model()
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.0))
    for p in model.parameters():
        if p.requires_grad:
            optimizer.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p]["step"] = torch.tensor(1.0)
    batch = Batch(total=8, micro=8, accumulation=1)
    facts = {"run": RUN, "config": Config(), "world_size": 1, "batch": batch, "bad_samples": [], "classes": ["a", "b"]}
    (folder / "run").mkdir()
    save_checkpoint(folder / "run", 3, model, optimizer, **facts, keep=1)  # type: ignore[arg-type]
    make_set(folder / "set", [5, 6, 7, 8])
    return folder


# --- doors


def door_checkpoint(folder: Path) -> object:
    model = small_model()
    path = newest_checkpoint(folder / "run")
    assert path is not None
    return resume(path, model, torch.optim.AdamW(model.optimizer_groups(0.0)), RUN)


def door_weights(folder: Path) -> object:
    return read_tensors(folder / "file")


def door_set(folder: Path) -> object:
    shards = ShardSet.open(folder / "set", "train")
    shards.check_files()
    return [shards[i] for i in range(len(shards))]


def door_recipe(folder: Path) -> object:
    return load_config(str(folder / "file"), needs_data=False)


def door_deepspeed(folder: Path) -> object:
    return load_config("demo", ["data.shards=x"], str(folder / "file"))


def door_annotations(folder: Path) -> object:
    for name in ("a.mp4", "b.mp4"):
        (folder / name).touch()
    return list_videos(folder, annotations=[folder / "file"])


def door_class_texts(folder: Path) -> object:
    return read_class_texts(str(folder / "file"))


def door_episodes(folder: Path) -> object:
    return read_episodes(folder / "file")


def door_truth(folder: Path) -> object:
    return read_truth(folder / "file")


def door_proposals(folder: Path) -> object:
    (folder / "truth.json").write_text(
        '{"database": {"v": {"subset": "test", "duration": 9, "annotations": [{"segment": [1, 2], "label": "a"}]}}}'
    )
    return read_segments(folder / "file", read_truth(folder / "truth.json"))


# --- poisons: each changes a copy of the good folder


def fifo(name: str) -> Callable[[Path], None]:
    """A file of which a read never ends."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def folder_of(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return make


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


STATE = "run/checkpoint-000003/state.json"
TENSORS = "run/checkpoint-000003/state.safetensors"


def state(**entries: Any) -> Callable[[Path], None]:
    """state.json with other entries, and without its own checksum, as a stranger makes it."""

    def write(folder: Path) -> None:
        document = json.loads((folder / STATE).read_text()) | entries
        document.pop("document_sha256", None)
        (folder / STATE).write_text(json.dumps(document))

    return write


def text_in(name: str, data: bytes | str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return write


file_of = partial(text_in, "file")
state_text = partial(text_in, STATE)
manifest_text = partial(text_in, "set/manifest.json")
index_data = partial(text_in, "set/train-000000.index.safetensors")


def sealed(folder: Path, data: bytes) -> None:
    """Other tensors, with the right checksum."""
    (folder / TENSORS).write_bytes(data)
    state(tensors_sha256=sha256(data).hexdigest())(folder)


def tensors(change: Callable[[State], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        found = load_tensors((folder / TENSORS).read_bytes())
        change(found)
        sealed(folder, save_tensors(found))

    return write


def raw_tensors(data: bytes) -> Callable[[Path], None]:
    return lambda folder: sealed(folder, data)


def header(text: str | bytes, length: int | None = None) -> bytes:
    """A .safetensors file of this header and 64 bytes."""
    data = text.encode() if isinstance(text, str) else text
    return (len(data) if length is None else length).to_bytes(8, "little") + data + bytes(64)


HEAD = "cls_head.fc_cls.weight"
WEIGHT = f"weights/{HEAD}"


def put(name: str, value: float) -> Callable[[State], object]:
    return lambda found: found[name].view(-1)[0:1].fill_(value)


def torch_file(value: Callable[[Path], Any], *, legacy: bool = False) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        torch.save(value(folder), folder / "file", _use_new_zipfile_serialization=not legacy)

    return write


def plain_pickle(folder: Path) -> None:
    (folder / "file").write_bytes(pickle.dumps(Canary(folder / "canary")))


def zip_bomb(folder: Path) -> None:
    """0.1 MB that unpacks to 64 MB."""
    torch.save({"w": torch.zeros(3)}, folder / "file")
    with zipfile.ZipFile(folder / "file", "a", zipfile.ZIP_DEFLATED) as archive, archive.open("big", "w") as member:
        for _ in range(16):
            member.write(bytes(2**22))


def zip_of(**members: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / "file", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    return write


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Another manifest, with the right fingerprint where one can be computed."""

    def write(folder: Path) -> None:
        path = folder / "set" / "manifest.json"
        document = json.loads(path.read_text())
        change(document)
        document.pop("fingerprint", None)
        try:
            write_manifest(folder / "set", document)
        except (KeyError, TypeError, AttributeError):
            path.write_text(json.dumps(document | {"fingerprint": "x"}))

    return write


def first_shard(**entries: Any) -> Callable[[Path], None]:
    return manifest(lambda document: document["splits"]["train"]["shards"][0].update(entries))


def index_array(name: str, place: int, value: int) -> Callable[[Path], None]:
    """Another number in an index, whose own checksums are then wrong."""

    def write(folder: Path) -> None:
        path = folder / "set/train-000000.index.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        document = json.loads(data[8 : 8 + length])
        start, _ = document[name]["data_offsets"]
        width = {"I64": 8, "U64": 8, "I32": 4}[document[name]["dtype"]]
        at = 8 + length + start + place * width
        path.write_bytes(data[:at] + value.to_bytes(width, "little", signed=value < 0) + data[at + width :])

    return write


POISONS: dict[str, tuple[Callable[[Path], object], Callable[[Path], None], str]] = {
    # checkpoints
    "state: empty": (door_checkpoint, state_text(""), "is damaged"),
    "state: nested": (door_checkpoint, state_text(NESTED), "is damaged"),
    "state: no object": (door_checkpoint, state_text("[1]"), "is damaged"),
    "state: NUL bytes": (door_checkpoint, state_text("\0" * 1000), "is damaged"),
    "state: no step": (door_checkpoint, state_text('{"format_version": 1}'), "is damaged"),
    "state: version": (door_checkpoint, state(format_version="9" * 10_000), "has format version"),
    "state: step a text": (door_checkpoint, state(step="3; rm"), "step ="),
    "state: step a truth": (door_checkpoint, state(step=True), "step ="),
    "state: step below 0": (door_checkpoint, state(step=-1), "step ="),
    "state: step too large": (door_checkpoint, state(step=10**300), "step ="),
    "state: run a list": (door_checkpoint, state(run=[1, 2]), "run ="),
    "state: config a text": (door_checkpoint, state(config="x"), "config ="),
    "state: bad samples no list": (door_checkpoint, state(bad_samples={"a": 1}), "bad_samples ="),
    "state: bad samples are texts": (door_checkpoint, state(bad_samples=["../x"]), "bad_samples ="),
    "state: classes no texts": (door_checkpoint, state(classes=[[1]]), "classes ="),
    "state: micro-batch 0": (door_checkpoint, state(micro_batch=0), "micro_batch ="),
    "state: skipped": (door_checkpoint, state(skipped_steps=[]), "skipped_steps ="),
    "state: checksum a list": (door_checkpoint, state(tensors_sha256=[]), "tensors_sha256 ="),
    "state: another run": (door_checkpoint, state(run={"optimizer.lr": 2}), "optimizer.lr is 0.001 now and was 2"),
    "state: a pipe": (door_checkpoint, fifo(STATE), "is no file"),
    "state: a device": (door_checkpoint, link(STATE, "/dev/zero"), "is no file"),
    "state: a folder": (door_checkpoint, folder_of(STATE), "is no file"),
    "tensors: a device": (door_checkpoint, link(TENSORS, "/dev/zero"), "is no file"),
    "tensors: a file outside": (door_checkpoint, link(TENSORS, "/etc/passwd"), "is damaged (checksum)"),
    "tensors: NaN weight": (door_checkpoint, tensors(put(WEIGHT, float("nan"))), f"first is {WEIGHT}"),
    "tensors: infinite weight": (door_checkpoint, tensors(put(WEIGHT, float("-inf"))), f"first is {WEIGHT}"),
    "tensors: NaN in Adam": (door_checkpoint, tensors(put(f"exp_avg_sq/{HEAD}", float("nan"))), "first is exp_avg_sq/"),
    "tensors: integers": (door_checkpoint, tensors(lambda t: t.update({WEIGHT: t[WEIGHT].int()})), WEIGHT),
    "tensors: other shape": (door_checkpoint, tensors(lambda t: t.update({WEIGHT: torch.zeros(5, 7)})), "does not fit"),
    "tensors: one missing": (door_checkpoint, tensors(lambda t: t.pop(WEIGHT)), "does not fit the model"),
    "tensors: one more": (door_checkpoint, tensors(lambda t: t.update({"weights/../x": torch.ones(1)})), "../x is in"),
    "tensors: no exp_avg": (door_checkpoint, tensors(lambda t: t.pop(f"exp_avg/{HEAD}")), "is missing"),
    "tensors: shape in Adam": (
        door_checkpoint,
        tensors(lambda t: t.update({f"exp_avg_sq/{HEAD}": torch.zeros(3)})),
        "is [3], not",
    ),
    "tensors: none": (door_checkpoint, raw_tensors(b""), "holds no tensors"),
    "tensors: huge header": (door_checkpoint, raw_tensors(header("{}", 2**62)), "holds no tensors"),
    "tensors: nested header": (door_checkpoint, raw_tensors(header('{"a":' * 100_000)), "holds no tensors"),
    "tensors: offsets outside": (
        door_checkpoint,
        raw_tensors(header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999]}}')),
        "holds no tensors",
    ),
    "tensors: a pickle": (door_checkpoint, raw_tensors(pickle.dumps(Canary(Path("canary")))), "holds no tensors"),
    # weight files
    "weights: empty": (door_weights, file_of(b""), "is no weight file"),
    "weights: a pipe": (door_weights, fifo("file"), "is no file"),
    "weights: a device": (door_weights, link("file", "/dev/zero"), "is no file"),
    "weights: a canary": (door_weights, torch_file(lambda f: {"w": Canary(f / "canary")}), "pickled Python objects"),
    "weights: an old canary": (
        door_weights,
        torch_file(lambda f: {"w": Canary(f / "canary")}, legacy=True),
        "pickled Python objects",
    ),
    "weights: a pickle": (door_weights, plain_pickle, "pickled Python objects"),
    "weights: a zip bomb": (door_weights, zip_bomb, "claims to unpack to"),
    "weights: no archive": (door_weights, file_of(b"PK" + bytes(2000)), "is not a whole PyTorch file"),
    "weights: another zip": (door_weights, zip_of(a=b"x" * 100), "is not a whole PyTorch file"),
    "weights: traversal": (door_weights, zip_of(**{"../../canary/data.pkl": b"x"}), "is not a whole PyTorch file"),
    "weights: a program": (door_weights, zip_of(**{"x/constants.pkl": b"x"}), "is a TorchScript archive"),
    "weights: stretched": (
        door_weights,
        torch_file(lambda f: {"w": torch.zeros(1).expand(10**6, 10**6)}),
        "more than the file holds",
    ),
    "weights: no names": (door_weights, torch_file(lambda f: {1: torch.zeros(1)}), "is no name"),
    "weights: sparse": (door_weights, torch_file(lambda f: {"w": torch.eye(3).to_sparse()}), "is no plain tensor"),
    "weights: a list": (door_weights, torch_file(lambda f: [torch.zeros(1)]), "holds no state dict"),
    "weights: huge header": (door_weights, file_of(header("{}", 2**40)), "is not a whole .safetensors file"),
    "weights: nested": (door_weights, file_of(header('{"a":' * 50_000)), "is not a whole .safetensors file"),
    "weights: shape lies": (
        door_weights,
        file_of(header('{"a":{"dtype":"F32","shape":[9999999999,9999999999],"data_offsets":[0,64]}}')),
        "is not a whole .safetensors file",
    ),
    # sets
    "manifest: nested": (door_set, manifest_text(NESTED), "is damaged"),
    "manifest: NUL bytes": (door_set, manifest_text("\0" * 999), "is damaged"),
    "manifest: a list": (door_set, manifest_text("[]"), "is damaged"),
    "manifest: a pipe": (door_set, fifo("set/manifest.json"), "no manifest.json"),
    "manifest: traversal": (door_set, first_shard(name="../train-000000.tar"), "a shard is a file NAME.tar in"),
    "manifest: absolute": (door_set, first_shard(name="/etc/passwd.tar"), "a shard is a file NAME.tar in"),
    "manifest: hidden": (door_set, first_shard(name=".x.tar"), "a shard is a file NAME.tar in"),
    "manifest: name a number": (door_set, first_shard(name=7), "a shard is a file NAME.tar in"),
    "manifest: samples lie": (door_set, first_shard(samples=10**12), "has 1000000000000 samples, allowed are"),
    "manifest: samples below 0": (door_set, first_shard(samples=-4), "is damaged"),
    "manifest: samples a text": (door_set, first_shard(samples="4"), "is damaged"),
    "manifest: bytes a text": (door_set, first_shard(bytes="4"), "is damaged"),
    "manifest: an entry more": (door_set, first_shard(path="/etc/passwd"), "is damaged"),
    "manifest: classes a number": (door_set, manifest(lambda m: m.update(classes=7)), "is damaged"),
    "manifest: classes no texts": (door_set, manifest(lambda m: m.update(classes=[["a"], {}])), "is damaged"),
    "manifest: profile a text": (door_set, manifest(lambda m: m.update(profile="jpeg")), "is damaged"),
    "manifest: profile": (door_set, manifest(lambda m: m.update(profile={"name": ["x"]})), "is damaged"),
    "manifest: no split": (door_set, manifest(lambda m: m.update(splits={})), "has no split"),
    "manifest: a split of nothing": (door_set, manifest(lambda m: m["splits"].update(train=[])), "is damaged"),
    "index: empty": (door_set, index_data(b""), "is damaged"),
    "index: huge header": (door_set, index_data(header("{}", 2**63)), "is damaged"),
    "index: nested": (door_set, index_data(header('{"a":' * 50_000)), "is damaged"),
    "index: other arrays": (door_set, index_data(header(U8 % (0, 8))), "lacks"),
    "index: offsets below 0": (door_set, index_data(header(U8 % (-8, 0))), "lacks"),
    "index: a pipe": (door_set, fifo("set/train-000000.index.safetensors"), "is no file"),
    "index: points outside": (door_set, index_array("video_offset", 0, 2**40), "is damaged"),
    "index: borders": (door_set, index_array("first_frame", 1, 2**40), "is damaged"),
    "index: borders below 0": (door_set, index_array("first_key", 1, -5), "is damaged"),
    # recipes and DeepSpeed documents
    "recipe: nested": (door_recipe, file_of("a = " + NESTED), "is not valid TOML"),
    "recipe: NUL bytes": (door_recipe, file_of(b"\0\xff" * 99), "is not valid TOML"),
    "recipe: huge": (door_recipe, file_of("#" * 2**25), "bytes; allowed are"),
    "recipe: a type": (door_recipe, file_of("[data]\nnum_frames = [8]"), "data.num_frames = [8]; allowed is"),
    "recipe: not finite": (door_recipe, file_of("[optimizer]\nlr = nan"), "optimizer.lr = NaN; allowed is more than 0"),
    "recipe: a section": (door_recipe, file_of("data = 1"), "stands outside a section"),
    "recipe: no text": (door_recipe, file_of("[run]\nout = 3"), "run.out = 3; allowed is text"),
    "recipe: DeepSpeed elsewhere": (door_recipe, file_of('deepspeed_config = "/dev/zero"'), "no such DeepSpeed file"),
    "ds: nested": (door_deepspeed, file_of(NESTED), "is not valid JSON"),
    "ds: NUL bytes": (door_deepspeed, file_of(b"\0\xff" * 99), "is not valid JSON"),
    "ds: a list": (door_deepspeed, file_of("[]"), "is not a JSON object"),
    "ds: huge": (door_deepspeed, file_of("{" + " " * 2**25 + "}"), "bytes; allowed are"),
    "ds: infinite": (
        door_deepspeed,
        file_of('{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "gradient_clipping": Infinity}'),
        "gradient_clipping = Infinity",
    ),
    # annotations and lists
    "annotations: NUL bytes": (door_annotations, file_of(b"a.mp4 0\nb.mp4 1\nx\0y.mp4 1\n"), "control characters"),
    "annotations: traversal": (door_annotations, file_of("a.mp4 0\nb.mp4 1\n../../etc/passwd 1\n"), "../../etc/passwd"),
    "annotations: absolute": (door_annotations, file_of("a.mp4 0\nb.mp4 1\n/etc/passwd 1\n"), "/etc/passwd"),
    "annotations: huge line": (door_annotations, file_of("a.mp4 0\n" + "x" * 2**22 + " 1"), "characters; allowed are"),
    "annotations: no text": (door_annotations, file_of(b"\xff\xfe\xfd" * 99), "not a text file"),
    "annotations: a pipe": (door_annotations, fifo("file"), "is no file"),
    "class texts: nested": (door_class_texts, file_of(NESTED), "a JSON object"),
    "class texts: a number": (door_class_texts, file_of('{"a": 1}'), "allowed is a text"),
    "class texts: a pipe": (door_class_texts, fifo("file"), "no such file"),
    "episodes: nested": (door_episodes, file_of(NESTED), "is not valid JSON"),
    "episodes: numbers": (door_episodes, file_of('{"episodes": [{"classes": [1, 2]}]}'), "is no list of texts"),
    "episodes: a pipe": (door_episodes, fifo("file"), "is no file"),
    "truth: nested": (door_truth, file_of(NESTED), "is not valid JSON"),
    "truth: a pipe": (door_truth, fifo("file"), "is no file"),
    "proposals: not finite": (door_proposals, file_of('{"results": {"v": [{"segment": [0, NaN]}]}}'), "finite"),
    "proposals: a list": (door_proposals, file_of('{"results": []}'), "is not in ActivityNet's format"),
}  # fmt: skip


@pytest.mark.parametrize("name", POISONS)
@pytest.mark.timeout(30)
def test_poison_is_refused_in_one_line(name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    door, poison, words = POISONS[name]
    inside = tmp_path / "inside"
    shutil.copytree(good, inside)
    poison(inside)
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    used, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises((ValueError, OSError)) as failure:
        door(inside)
    assert words in str(failure.value)
    assert "\n" not in str(failure.value).strip() and len(str(failure.value)) < 1500
    assert time.monotonic() - started < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) * 1024 < MOST_BYTES
    new = {path.name for path in tmp_path.rglob("*")} - {path.name for path in before}
    assert new <= {"a.mp4", "b.mp4", "truth.json"}, "the file did something"


# --- random damage


def flip(path: Path, random: np.random.Generator) -> Callable[[], object]:
    """Flips, cuts or adds bytes; returns what undoes it."""
    data = path.read_bytes()
    damaged = bytearray(data)
    kind = random.integers(10)
    if kind == 0:
        del damaged[int(random.integers(len(data))) :]
    elif kind == 1:
        damaged += random.bytes(int(random.integers(1, 100)))
    else:
        span = len(data) if random.random() < 0.5 else min(2000, len(data))  # headers are at the beginning
        for _ in range(int(random.integers(1, 4))):
            damaged[int(random.integers(span))] ^= 1 << int(random.integers(8))
    path.write_bytes(damaged)
    return partial(path.write_bytes, data)


def of_checkpoint(folder: Path) -> object:
    document, found = read_checkpoint(folder)
    wanted = {name: document[name] for name in ("step", "run", "config", "micro_batch", "bad_samples")}
    return wanted, sha256(save_tensors(dict(sorted(found.items())))).hexdigest()


def of_set(folder: Path) -> object:
    shards = ShardSet.open(folder, "train")
    rows = [shards[i] for i in range(len(shards))]
    return shards.classes, [(row.key, row.labels, row.video_offset, row.frames.checksum.tolist()) for row in rows]


@pytest.mark.parametrize("kind", ["tensors", "state", "index", "manifest"])
def test_random_damage_is_refused_or_does_nothing(kind: str, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "good")
    checkpoint, packed = (tmp_path / "good" / STATE).parent, tmp_path / "good" / "set"
    path, read, folder = {
        "tensors": (checkpoint / "state.safetensors", of_checkpoint, checkpoint),
        "state": (checkpoint / "state.json", of_checkpoint, checkpoint),
        "index": (index_path_of(packed / "train-000000.tar"), of_set, packed),
        "manifest": (packed / "manifest.json", of_set, packed),
    }[kind]
    expected, random, ends = read(folder), np.random.default_rng(SEED), Counter[str]()
    for _ in range(FLIPS):
        undo = flip(path, random)
        try:
            assert read(folder) == expected
            ends["the same bits"] += 1
        except (ValueError, OSError) as error:
            assert str(error).strip()
            ends["refused"] += 1
        undo()
    print(f"\n{kind}: {FLIPS} times damaged, {dict(ends)}", end="")
    assert ends["refused"] > FLIPS // 2
