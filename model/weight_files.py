"""Weight files of strangers: every tensor by its name, and nothing in the file is executed."""

from __future__ import annotations

import lzma
import re
import stat
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_WRAPPERS = ("state_dict", "model_state", "model")  # mmaction; facebookresearch; Swin


def read_tensors(path: Path) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Every tensor of a weight file by its key, and what stood beside them: name and reason.

    Nothing in the file is executed. Raises ValueError: not whole, not a weight file, or one that only a program could
    read (pickled Python objects, a TorchScript archive), with what to do then; OSError if it cannot be opened.
    """
    if not (stat.S_ISREG(kind := path.stat().st_mode) or stat.S_ISDIR(kind)):  # a pipe or a device may never end
        raise ValueError(f"{path} is no file; name one of weights, .safetensors or PyTorch's")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # after the length of the header, which may look like anything
        try:
            return load_file(path), []
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error
    if start[:2] == b"PK":
        _refuse_program(path)
    elif start[:1] != b"\x80":
        raise ValueError(f"{path} is no weight file: neither .safetensors nor PyTorch (.pth, .pt, .bin)")
    document = _load_plain(path)
    return _unwrapped(path, document)


def _refuse_program(path: Path) -> None:
    """ValueError for a damaged zip archive, or for one that holds a program besides its weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            program = any(m.filename.endswith("/constants.pkl") or "/code/" in m.filename for m in members)
            claimed = sum(member.file_size for member in members)
            if claimed > path.stat().st_size and not program:  # PyTorch compresses programs alone
                raise ValueError(f"it is compressed, and claims to unpack to {claimed} bytes; save it with torch.save")
            damaged = None if program else archive.testzip()  # torch.load does not look at the checksums
    except (zipfile.BadZipFile, lzma.LZMAError, EOFError, OSError, ValueError, RuntimeError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole PyTorch file: {error}") from error
    if program:
        raise ValueError(
            f"{path} is a TorchScript archive, a program and not only weights, and is not opened; where it is trusted: "
            "safetensors.torch.save_file(torch.jit.load(IN, map_location='cpu').state_dict(), 'weights.safetensors'), "
            "then convert that file"
        )
    if damaged is not None:
        raise ValueError(f"{path} is not a whole PyTorch file: {damaged[:120]} is damaged; get the file again")


def _load_plain(path: Path) -> Any:
    """What a PyTorch file holds, if those are tensors and plain values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch finds odd about a damaged file: the error says it
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle makes torch raise any kind
        text = " ".join(str(error).split())
        if "Weights only load failed" in text:
            found = re.search(r"GLOBAL (\S+)|instruction (\S+)|type (\S+)", text)
            what = f" ({(found[1] or found[2] or found[3])[:80]})" if found else ""
            raise ValueError(
                f"{path} holds pickled Python objects{what}, which could run a program, and is not opened; on a "
                "machine where it is trusted, save its tensors with safetensors.torch.save_file and convert that file"
            ) from error
        raise ValueError(f"{path} is not a whole PyTorch file: {text[:200]}") from error


def _unwrapped(path: Path, document: Any) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The state dict in what a training program saved, and the entries beside it."""
    beside: list[tuple[str, str]] = []
    if isinstance(document, Mapping):
        wrapper = next((name for name in _WRAPPERS if isinstance(document.get(name), Mapping)), None)
        if wrapper is not None:
            reason = "state of the training program, not weights"
            beside = [(str(name), reason) for name in document if name != wrapper]
            document = document[wrapper]
    if not isinstance(document, Mapping) or not document:
        what = "an empty table" if isinstance(document, Mapping) else type(document).__name__
        raise ValueError(f"{path} holds no state dict, but {what}; names and tensors are needed")
    file_bytes = path.stat().st_size
    for key, value in document.items():
        if not isinstance(key, str):
            raise ValueError(f"{path}: the key {str(key)[:80]!r} is no name")
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        if not plain or value.is_quantized or value.is_nested or value.is_meta:
            raise ValueError(f"{path}: {key[:80]} is no plain tensor, but {type(value).__name__}")
        if value.numel() * value.element_size() > file_bytes:
            raise ValueError(f"{path}: {key[:80]} claims the shape {list(value.shape)}, more than the file holds")
    return dict(document), beside
