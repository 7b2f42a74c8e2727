"""The table of how far written files are from their models. Writing itself is tested in tests/model/test_graphs.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.video import VideoModel
from tests.shell import call_program
from tools import check_exports
from tools.check_exports import main


def test_every_kind_of_image_model_and_the_merged_model_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: VideoModel, path: Path) -> dict[str, Any]:
        path.write_bytes(b"12345678")
        return {"largest_error": 1e-7 * model.num_frames}

    arguments = ("--methods", "aim,zero_i2v,prompt_clip", "--frames", "2")
    monkeypatch.setattr(check_exports, "WRITERS", {"onnx": ("model.onnx", write)})
    monkeypatch.chdir(tmp_path)
    ended = call_program(main, "export.json", *arguments)
    assert ended.stdout == "export.json: 3 methods; largest error onnx 2e-07\n", ended.stderr
    document = json.loads(Path("export.json").read_text())
    tried = {method: list(rows) for method, rows in document["methods"].items()}
    assert tried == {
        "aim": ["tiny-clip", "small Swin"],
        "zero_i2v": ["tiny-clip", "tiny-clip, merged"],
        "prompt_clip": ["tiny-clip"],
    }
    row = document["methods"]["aim"]["tiny-clip"]
    assert row["onnx"]["bytes"] == 8 and row["parameters"] > 850_000
    assert document["command"].endswith(" ".join(arguments))


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    ended = call_program(main, tmp_path / "x.json", "--methods", "aim,am")
    assert ended.returncode == 2 and ended.stderr.startswith("error: --methods am; allowed is adaptformer, ")
    ended = call_program(main, tmp_path / "none" / "x.json")
    assert ended.returncode == 2 and "there is no folder" in ended.stderr
