"""Weight files of strangers: what comes out of them, and that no file, however made, does more than be refused."""

from __future__ import annotations

import builtins
import json
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.weight_files import read_tensors

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


class Program:
    """Unpickled, it would make a file; `pickle` is told so in the same words as in any attack."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return builtins.open, (str(self._path), "w")


def refusal(path: Path) -> str:
    """The one line that a file is refused with, without its name."""
    with pytest.raises(ValueError) as error:
        read_tensors(path)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 600 + len(str(path))
    return text.removeprefix(str(path))


def safetensors(path: Path, header: object, data: bytes = bytes(4), header_bytes: int | None = None) -> Path:
    """A file with any header, and any claim of how long that is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_tensors_come_as_they_were_saved(tmp_path: Path, suffix: str) -> None:
    """Judging them, NaN and whole numbers included, is left to who knows what they are for."""
    state = {
        "weight": torch.tensor([1.0, float("nan"), -float("inf")]),
        "half": torch.arange(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "nothing": torch.empty(0, 5),
    }
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    tensors, beside = read_tensors(path)
    assert tensors.keys() == state.keys()
    for name, expected in state.items():
        assert tensors[name].dtype == expected.dtype
        torch.testing.assert_close(tensors[name], expected, rtol=0, atol=0, equal_nan=True)
    assert beside == []


def test_the_content_decides_what_a_file_is_and_not_its_suffix(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    save_file(state, tmp_path / "really.safetensors")
    torch.save(state, tmp_path / "really.pth")
    for real, named in (("really.safetensors", "called.bin"), ("really.pth", "called.safetensors")):
        (tmp_path / real).rename(tmp_path / named)
        assert torch.equal(read_tensors(tmp_path / named)[0]["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("document", "names", "beside"),
    [
        ({"state_dict": {"a": torch.ones(1)}, "model": {"b": torch.ones(1)}, 3: "x"}, ["a"], ["model", "3"]),
        ({"model": {"a": torch.ones(1)}, "state_dict": None}, ["a"], ["state_dict"]),
        ({"model": torch.ones(1), "other": torch.ones(1)}, ["model", "other"], []),  # a tensor of that name
        (OrderedDict(a=torch.nn.Parameter(torch.ones(1))), ["a"], []),
    ],
)
def test_the_first_table_under_a_known_name_is_the_state_dict(
    tmp_path: Path, document: Any, names: list[str], beside: list[str]
) -> None:
    torch.save(document, tmp_path / "a.pth")
    tensors, others = read_tensors(tmp_path / "a.pth")
    assert list(tensors) == names and [name for name, _ in others] == beside
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    assert {reason for _, reason in others} <= {"state of the training program, not weights"}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
def test_a_program_in_a_pickle_is_not_run_wherever_it_stands(tmp_path: Path, place: str, legacy: bool) -> None:
    program = Program(tmp_path / "planted")
    document = {
        "beside": {"state_dict": {"a": torch.ones(1)}, "hook": program},
        "inside": {"a": torch.ones(1), "b": program},
        "alone": program,
    }[place]
    path = tmp_path / "a.pth"
    torch.save(document, path, _use_new_zipfile_serialization=not legacy)
    said = refusal(path)
    assert said.startswith(" holds pickled Python objects (") and "open), which could run a program" in said
    assert said.endswith("save its tensors with safetensors.torch.save_file and convert that file")
    assert not (tmp_path / "planted").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "planted").exists(), "the file is the attack that it is meant to be"


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ({"a": ONE}, {"header_bytes": 2**62}, "header too large"),
        ({"a": ONE}, {"header_bytes": 10_000}, "is not a whole .safetensors file: "),
        ({"a": ONE}, {"data": bytes(3)}, "not fully covered"),
        ({"a": ONE}, {"data": bytes(5)}, "not fully covered"),
        ({"a": {**ONE, "shape": [2**62, 2**62]}}, {}, "overflow"),
        ({"a": {**ONE, "shape": [-1]}}, {}, "invalid value: integer `-1`"),
        ({"a": ONE, "b": ONE}, {}, "invalid offset"),  # two names for the same bytes
        ({"a": {**ONE, "dtype": "PY"}}, {}, "unknown variant `PY`"),
        (b'{"a":' + b"[" * 100_000, {}, "is not a whole .safetensors file: "),
        (b'{"\xff": 1}', {}, "invalid UTF-8"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, options: dict[str, Any], message: str) -> None:
    said = refusal(safetensors(tmp_path / "a.safetensors", header, **options))
    assert said.startswith(" is not a whole .safetensors file: ") and message in said
    assert list(read_tensors(safetensors(tmp_path / "good.safetensors", {"a": ONE}))[0]) == ["a"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([torch.ones(1)], " holds no state dict, but list; names and tensors are needed"),
        (torch.ones(1), " holds no state dict, but Tensor; names and tensors are needed"),
        (None, " holds no state dict, but NoneType; names and tensors are needed"),
        ({"model": {}}, " holds no state dict, but an empty table; names and tensors are needed"),
        ({"a": torch.ones(1), "b": [1.0]}, ": b is no plain tensor, but list"),
        ({"a": {"b": torch.ones(1)}}, ": a is no plain tensor, but dict"),
        ({"n" * 10_000: "text"}, f": {'n' * 80} is no plain tensor, but str"),
        ({("a",): torch.ones(1)}, ": the key \"('a',)\" is no name"),
        ({"a": torch.ones(1).expand(2**40)}, ": a claims the shape [1099511627776], more than the file holds"),
        ({"a": torch.quantize_per_tensor(torch.ones(1), 0.1, 0, torch.quint8)}, ": a is no plain tensor, but Tensor"),
    ],
)
def test_what_is_no_table_of_tensors_is_named(tmp_path: Path, document: Any, message: str) -> None:
    torch.save(document, tmp_path / "a.pth")
    assert refusal(tmp_path / "a.pth") == message


def test_an_archive_that_cannot_be_unpacked_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for method, damage in ((zipfile.ZIP_DEFLATED, 60), (zipfile.ZIP_BZIP2, 60), (zipfile.ZIP_STORED, 60)):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("a/data.pkl", bytes(range(256)) * 50)
        data = bytearray(path.read_bytes())
        data[damage : damage + 8] = bytes(byte ^ 0xFF for byte in data[damage : damage + 8])
        path.write_bytes(data)
        assert refusal(path).startswith(" is not a whole PyTorch file: ")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
    for field, value, said in ((6, 1, "is encrypted"), (8, 99, "compression method is not supported")):
        data = bytearray(path.read_bytes())
        directory = data.rindex(b"PK\x01\x02")
        struct.pack_into("<H", data, field, value)
        struct.pack_into("<H", data, directory + field + 2, value)
        (tmp_path / f"{field}.pth").write_bytes(data)
        assert said in refusal(tmp_path / f"{field}.pth")


@pytest.mark.parametrize("data", [b"", b"\x80", b"PK", b"\x80\x02" + b"]" * 100_000, b"\x93NUMPY", b"\x7fELF\x02\x01"])
def test_the_first_bytes_of_anything_are_no_weights(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(data)
    said = refusal(tmp_path / "a.bin")
    known = data[:1] == b"\x80" or data[:2] == b"PK"
    nothing = " is no weight file: neither .safetensors nor PyTorch (.pth, .pt, .bin)"
    assert said.startswith(" is not a whole PyTorch file: ") if known else said == nothing


def test_a_path_that_cannot_be_opened_is_the_systems_error(tmp_path: Path) -> None:
    for path, error in ((tmp_path, IsADirectoryError), (tmp_path / "no", FileNotFoundError)):
        with pytest.raises(error, match=str(path)):
            read_tensors(path)


def test_an_archive_whose_packing_is_broken_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/data.pkl", bytes(range(256)) * 50)
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(byte ^ 0xFF for byte in data[60:90])
    path.write_bytes(data)
    assert refusal(path).startswith(" is not a whole PyTorch file: ")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(range(256)) * 50)
    data = bytearray(path.read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    struct.pack_into("<2I", data, directory + 20, 10**6, 10**6)  # more than the file has
    path.write_bytes(data)
    assert refusal(path).startswith(" is not a whole PyTorch file: ")


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_tensors_without_plain_data_are_named(tmp_path: Path) -> None:
    for odd in (torch.empty(3, device="meta"), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])):
        torch.save({"a": odd}, tmp_path / "a.pth")
        assert refusal(tmp_path / "a.pth") == ": a is no plain tensor, but Tensor"
