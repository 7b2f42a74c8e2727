"""Reports of runs: what a page says, what it keeps beside it, what it does without, and what a browser makes of it."""

from __future__ import annotations

import csv
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.features import make_feature_set
from tests.train.runs import FP32, metrics, run_here
from train import report, report_parts
from train.bad_samples import COLUMNS
from train.evaluate import Evaluation
from train.report import report_finished_run, write_report
from train.report_clips import ShownClip, of_different_classes
from train.run_folder import RunFolder

HOSTILE = "<script>alert('x')</script>\"><img src=http://x.invalid/a>"
TABLES = ("per_class.csv", "confusion.csv")
MAPS = ("attention.png",)
ALL = (*TABLES, "mistakes.png", *MAPS)
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def run(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny training that wrote its own report."""
    out = tmp_path_factory.mktemp("runs") / "tiny & run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")  # fixtures of a module come before the one that does it for a test
        torch.set_num_threads(1)
        run_here(packed, out, FP32, "optimizer.lr=0.01", "train.eval_every=1", "run.trace=false", "run.report=true")
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    return out


def words_of(page: Path) -> str:
    """The text of a page on one line."""
    body = page.read_text(encoding="utf-8").partition("<body>")[2]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def part(page: Path, title: str) -> str:
    """The markup of one section."""
    found = re.search(rf"<section id=\"[^\"]*\"><h2>{title}</h2>(.*?)</section>", page.read_text(), re.DOTALL)
    assert found
    return found[1]


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def arrays_of(run: Path) -> dict[str, Any]:
    with np.load(run / "predictions.npz") as file:
        return dict(file)


def answers_of(run: Path) -> Evaluation:
    stored = arrays_of(run)
    return Evaluation(stored["logits"], stored["labels"], stored["valid"])


def test_a_run_leaves_a_report_of_what_it_was_and_how_it_went(run: Path) -> None:
    words, last = words_of(run / "report.html"), metrics(run, "eval")[-1]
    assert "tiny & run" in words and "finished after 10 steps" in words
    assert f"top-1 {100 * last['top1']:.2f} %" in words and f"{last['loss']:.4g}" in words
    changed = part(run / "report.html", "Settings").partition("<details>")[0]
    assert "<td>optimizer.lr</td><td>0.01</td><td>0.0003</td>" in changed and "data.interval" not in changed
    assert "T_Adapter" in words and "None: every sample that was read could be decoded" in words
    assert f"python tools/predict.py '{run}' VIDEO" in words and "--resume" not in words
    assert len(metrics(run, "eval")) == part(run / "report.html", "Learning").count("<tr>") - 1 == 3
    for name in ("loss", "learning_rate", "accuracy", "waiting", "clips_per_s", "confusion", "classes", "attention"):
        with Image.open(run / "report" / f"{name}.png") as picture:
            assert min(picture.size) > 200, name


def test_it_shows_what_was_really_used_in_the_words_of_people(run: Path, copy: Path) -> None:
    page = (run / "report.html").read_text()
    words, facts = words_of(run / "report.html"), json.loads((run / "run.json").read_text())
    assert f"device {facts['device']}, 1 process " in words
    assert "top-5" not in words and "top5" in metrics(run, "eval")[-1], "there are 3 classes"
    linked = set(re.findall(r'<a href="#([^"]+)">', page))
    assert "learning" in linked and "bad-samples" not in linked and 'id="bad-samples"' in page
    launcher, command = ["deepspeed", "--num_gpus", "2"], ["train/main.py", "--local_rank=1", "--recipe", "demo"]
    more = {"micro_batch": 4, "num_classes": 6, "world_size": 2, "launcher": launcher, "command": command}
    edit_json(copy / "run.json", lambda facts: facts.update(more))
    again = write_report(copy)
    assert "<td>deepspeed.train_micro_batch_size_per_gpu</td><td>4</td>" in part(again, "Settings")
    assert "2 processes" in words_of(again) and "top-5 100.00 %" in words_of(again)
    assert "deepspeed --num_gpus 2 train/main.py --recipe demo" in part(again, "Environment")


def test_a_last_interval_of_too_few_steps_is_not_drawn() -> None:
    lines = [{"kind": "train", "step": step, "loss": step / 10} for step in (4, 8, 12, 13)]
    run = RunFolder(Path(), {}, lines)
    assert report_parts._averages(run, "loss") == ([4, 8, 12], [0.4, 0.8, 1.2])
    assert report_parts._left_out(run).startswith("The last line of the log is of 1 step and not drawn")
    lines[-1]["step"] = 14
    assert report_parts._averages(run, "loss")[0] == [4, 8, 12, 14] and not report_parts._left_out(run)


def test_its_tables_are_those_of_the_evaluation(run: Path) -> None:
    result = answers_of(run)
    with (run / "report" / "confusion.csv").open() as file:
        _, *rows = csv.reader(file)
    assert [[int(cell) for cell in row[1:]] for row in rows] == result.confusion().tolist()
    with (run / "report" / "per_class.csv").open() as file:
        accuracy = [float(row["accuracy"]) for row in csv.DictReader(file)]
    assert accuracy == pytest.approx(result.class_accuracy().tolist(), abs=1e-6)
    number = r"<td class=\"number\">"
    shown = re.findall(
        rf"<td>class(\d)</td>{number}\d+</td>{number}\d+</td>{number}([0-9.]+) %", part(run / "report.html", "Classes")
    )
    assert {int(c): float(share) for c, share in shown} == pytest.approx(
        {c: 100 * share for c, share in enumerate(accuracy)}, abs=0.01
    )


def test_mistakes_come_surest_first_with_the_frames_of_the_evaluation(run: Path) -> None:
    stored, result = arrays_of(run), answers_of(run)
    wrong = [row for row in range(26) if result.predicted[row] != result.labels[row]]
    shares = np.exp(stored["logits"]) / np.exp(stored["logits"]).sum(1, keepdims=True)
    wrong.sort(key=lambda row: -shares[row, result.predicted[row]])
    mistakes = part(run / "report.html", "Mistakes")
    shown = re.findall(r"<figcaption>class(\d), taken for class(\d) \((\d+) %\): (\w+)</figcaption>", mistakes)
    assert shown == [
        (str(result.labels[row]), str(answer), f"{100 * shares[row, answer]:.0f}", stored["keys"][row])
        for row, answer in ((row, result.predicted[row]) for row in wrong[:16])
    ]
    assert f"{len(wrong)} of 26 clips" in mistakes and mistakes.count("data:image/jpeg") == len(shown)
    assert part(run / "report.html", "Attention").count("data:image/jpeg") == 4


def test_clips_to_look_at_are_of_different_classes_first() -> None:
    clips = [ShownClip(number, str(number), (truth,), "a", 1.0) for number, truth in enumerate("aabacb")]
    assert [clip.sample_id for clip in of_different_classes(clips, 5)] == [0, 2, 4, 1, 3]


def test_whatever_a_run_is_called_stays_text(copy: Path) -> None:
    stored = arrays_of(copy) | {"classes": np.asarray([HOSTILE, "b", "c"])}
    stored["keys"] = np.asarray([HOSTILE] * 26)
    np.savez(copy / "predictions.npz", **stored)
    edit_json(copy / "run.json", lambda facts: facts["config"]["run"].update(out=HOSTILE))
    edit_json(copy / "run.json", lambda facts: facts.update(device=HOSTILE, command=[HOSTILE]))
    rows = (COLUMNS, ("1", HOSTILE, "val", "x.tar", HOSTILE))
    (copy / "bad_samples.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    page = write_report(copy).read_text()
    assert "<script" not in page and "<img src=http" not in page and page.count("&lt;script&gt;alert(") > 8
    assert "No clip is shown" in page, "these are not the keys of the set"


def unfinished(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:9])
    (run / "predictions.npz").unlink()
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def just_begun(run: Path) -> None:
    unfinished(run)
    (run / "metrics.jsonl").unlink()


def without_validation(run: Path) -> None:
    edit_json(run / "run.json", lambda facts: facts["config"]["data"].update(val_split=""))
    (run / "predictions.npz").unlink()


def with_broken_answers(run: Path) -> None:
    of_moved_set(run)
    data = (run / "predictions.npz").read_bytes()
    (run / "predictions.npz").write_bytes(data[: len(data) // 2])


def with_useless_answers(run: Path) -> None:
    of_moved_set(run)
    np.savez(run / "predictions.npz", **arrays_of(run) | {"valid": np.zeros(26, bool)})


def with_other_answers(run: Path) -> None:
    stored = arrays_of(run)
    for name in ("keys", "logits", "labels", "valid"):
        stored[name] = stored[name][1:]
    np.savez(run / "predictions.npz", **stored)


def of_moved_set(run: Path) -> None:
    edit_json(run / "run.json", lambda facts: facts["config"]["data"].update(shards="nowhere"))


def at_address(run: Path) -> None:
    edit_json(run / "run.json", lambda facts: facts["config"]["data"].update(shards="https://x.invalid/set"))


def of_features(run: Path) -> None:
    folder = make_feature_set(run / "features", [9] * 26, splits=("val",))
    edit_json(run / "run.json", lambda facts: facts["config"]["data"].update(shards=str(folder)))


def of_unknown_settings(run: Path) -> None:
    edit_json(run / "run.json", lambda facts: facts["config"]["model"].update(method="tomorrow's"))


def with_skipped_steps(run: Path) -> None:
    of_moved_set(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"skipped_steps": 0 if line["step"] < 4 else 2 if line["step"] < 8 else 3}
    lines[1]["loss"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def recognising_all(run: Path) -> None:
    stored = arrays_of(run)
    np.savez(run / "predictions.npz", **stored | {"logits": 9 * np.eye(3, dtype=np.float32)[stored["labels"]]})


def with_several_labels(run: Path) -> None:
    stored = arrays_of(run)
    hot = np.eye(3, dtype=np.uint8)[stored["labels"]]
    hot[::2, 0] = 1
    np.savez(run / "predictions.npz", **stored | {"labels": hot})


@pytest.mark.parametrize(
    ("change", "said", "leaves"),
    [
        (unfinished, ("not finished: step 4 of 10", "--resume", "There are no answers", "cannot be loaded"), ()),
        (just_begun, ("not finished: step 0 of 10", "Nothing was logged yet", "too short to be measured"), ()),
        (without_validation, ("The run had no validation split", "the model after step 10"), MAPS),
        (with_broken_answers, ("predictions.npz is damaged", "T_Adapter"), ()),
        (with_useless_answers, ("the answers in", "none is valid"), ()),
        (with_other_answers, ("No clip is shown: ", "is not what it was when the answers were given"), TABLES),
        (of_moved_set, ("The set cannot be opened: no such folder of shards: nowhere",), TABLES),
        (at_address, ("No clips are fetched from https://x.invalid/set at the end of a training: python",), TABLES),
        (of_features, ("holds features in place of frames",), TABLES),
        (of_unknown_settings, ("are not those of a run of this version", "tomorrow's"), TABLES),
        (with_skipped_steps, ("skipped steps 3", "red: steps were skipped since the line before"), TABLES),
        (recognising_all, ("None: every clip that could be decoded was", "recognised (100 %)"), (*TABLES, *MAPS)),
        (with_several_labels, ("average precision", "class0 + class1, "), ("per_class.csv", "mistakes.png", *MAPS)),
    ],
)
def test_a_report_has_what_there_is_and_says_the_rest(
    copy: Path, change: Change, said: tuple[str, ...], leaves: tuple[str, ...]
) -> None:
    """And leaves no picture of the report before."""
    change(copy)
    page = write_report(copy, fetches=False)
    words = words_of(page)
    assert all(text in words for text in said), words
    assert {path.name for path in (copy / "report").iterdir()} & set(ALL) == set(leaves)
    assert ("data:image/jpeg" in part(page, "Attention")) == (MAPS[0] in leaves)


def test_a_model_whose_attention_cannot_be_drawn_is_said(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("this model has no class token")

    monkeypatch.setattr(report_parts, "looks_of", refuse)
    assert "Not drawn: this model has no class token." in words_of(write_report(copy))


def test_an_evaluation_of_a_run_has_a_report_of_its_answers(copy: Path) -> None:
    folder = copy / "evaluation-x"
    folder.mkdir()
    facts = {"checkpoint": str(copy), "views": "3x1", "precision": "fp32", "top1": 0.125, "num_frames": 2}
    (folder / "metrics.json").write_text(json.dumps(facts))
    recognising_all(copy)
    shutil.move(copy / "predictions.npz", folder)
    page = write_report(folder)
    words = words_of(page)
    assert page == folder / "report.html" and (folder / "report" / "confusion.csv").exists()
    assert "run: evaluation-x" in words and "evaluated with 3x1 views in fp32" in words and "top-1 12.50 %" in words
    assert "every clip that could be decoded was recognised" in words


def test_a_report_that_fails_never_fails_a_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect\nof ours")

    monkeypatch.setattr(report, "write_report", fail)
    report_finished_run(run)
    said = capsys.readouterr()
    expected = f"no report was written (RuntimeError: a defect of ours); try again: python tools/report.py '{run}'\n"
    assert (said.out, said.err) == ("", expected)


def damaged(change: Callable[[Any], None]) -> Change:
    return lambda run: edit_json(run / "run.json", change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "is no run: there is no run.json in it"),
        (lambda run: (run / "run.json").write_text("[1]"), "it is no JSON object"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "metrics.jsonl, line 1: it has no kind and step"),
        (damaged(lambda facts: facts.update(config=[])), "config is not as the trainer writes it"),
        (damaged(lambda facts: facts["config"].update(model=3)), "config is not as the trainer writes it"),
        (damaged(lambda facts: facts.update(parameters={"total": "many"})), "parameters is not as the trainer"),
        (damaged(lambda facts: facts.update(samples=0)), "samples is not as the trainer"),
        (damaged(lambda facts: facts.update(packages=3)), "packages is not as the trainer"),
        (damaged(lambda facts: facts.update(command="rm")), "command is not as the trainer"),
        (damaged(lambda facts: facts.pop("device")), "has no 'device'"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(copy: Path, change: Change, message: str) -> None:
    change(copy)
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as raised:
        write_report(copy)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium or google-chrome on PATH")
    return found


@pytest.fixture
def served(run: Path, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a folder with the report and a page that shows it 400 pixels wide; what was asked for."""
    shutil.copy(run / "report.html", tmp_path / "report.html")
    frame = "<iframe src=report.html style='width:400px;height:9000px;border:0' onload=\"{}\"></iframe><p id=said></p>"
    measure = "d=this.contentDocument.documentElement; said.textContent='wide '+d.scrollWidth+' of '+d.clientWidth"
    (tmp_path / "narrow.html").write_text("<!doctype html><link rel=icon href=data:,>" + frame.format(measure))
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def browse(browser: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu", "extensions", "default-apps")
    options = (f"--disable-{name}" for name in quiet)
    command = [browser, "--headless", "--no-sandbox", "--no-first-run", *options, f"--user-data-dir={folder}/profile"]
    more = ("--enable-logging=stderr", "--hide-scrollbars", "--virtual-time-budget=10000", *arguments)
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def test_a_browser_shows_it_without_an_error_or_a_request(
    browser: str, served: tuple[str, list[str]], tmp_path: Path
) -> None:
    """At a desk and on a telephone, where nothing is wider than its screen but what scrolls in its own box."""
    address, asked = served
    wide = browse(
        browser, tmp_path, "--window-size=1280,3000", f"--screenshot={tmp_path}/wide.png", f"{address}/report.html"
    )
    assert asked == ["/report.html"] and "CONSOLE" not in wide.stderr
    with Image.open(tmp_path / "wide.png") as picture:
        assert picture.size == (1280, 3000) and len(picture.convert("RGB").getcolors(10**6) or ()) > 200
    asked.clear()
    narrow = browse(browser, tmp_path, "--window-size=500,900", "--dump-dom", f"{address}/narrow.html")
    assert "CONSOLE" not in narrow.stderr and set(asked) == {"/narrow.html", "/report.html"}
    assert "wide 400 of 400" in narrow.stdout
