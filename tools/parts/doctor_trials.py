"""What tools/doctor.py tries: decoders, attention, DeepSpeed; each in a process that may crash or hang without harm.

`try_all` starts one process for a group of trials, which share what they import. The process says which trial begins
and what it found; if it dies or its time is over, the trial it was at gets the blame and a fresh process goes on with
the next. Without a CUDA device its trials say so and name what is used instead.

What runs on CUDA here has not been run on a GPU yet.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.parts.doctor_machine import FALLBACK, OK, PROBLEM, ROOT, SETUP, Row, decode_rates

SIDE, FRAMES = 64, 10  # of the video that is made on the spot
PICTURES_DIFFER = 12.0  # levels of 255, on average: as much as the codecs take, and no other picture
STEP_ON_CPU = "0.46 s a clip (8 frames) and core for each of ViT-B/16's 12 blocks"
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CHILD = "import sys; sys.path[0] = sys.argv[1]; from tools.parts import doctor_trials; doctor_trials.run_trials()"


def try_all(trials: Sequence[tuple[str, str]], seconds: float) -> list[Row]:
    """The rows of trials (name in `TRIALS`, argument), in their order; a process may take so long."""
    rows, left = [], list(trials)
    while left:
        messages, ending = _child(left, seconds)
        rows += [Row(**message) for message in messages if "begin" not in message]
        begun = sum("begin" in message for message in messages)
        if ending is None and begun == len(left):
            break
        name = left[max(0, begun - 1)][0]
        status = FALLBACK if name == "NVDEC" else PROBLEM  # which training does without
        rows.append(Row(status, name, f"its trial {ending or 'ended early'}", remedy=_MENDING))
        left = left[max(1, begun) :]
    return rows


_MENDING = f"{SETUP}; TRACEBACK=1 python tools/doctor.py says more"


def _child(trials: Sequence[tuple[str, str]], seconds: float) -> tuple[list[dict[str, str]], str | None]:
    """What a process that runs these trials sent, and how it ended if not well."""
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    with tempfile.TemporaryFile() as sent:
        command = [sys.executable, "-c", _CHILD, str(ROOT), str(sent.fileno()), json.dumps(trials)]
        ending = None
        with subprocess.Popen(
            command,
            env=environment,
            pass_fds=(sent.fileno(),),
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("TRACEBACK") == "1" else subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                _, said = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                ending = f"took more than {seconds:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if ending is None and process.returncode:
            ending = _ending(process.returncode, (said or b"").decode(errors="replace"))
        sent.seek(0)
        return [json.loads(line) for line in sent.read().splitlines()], ending


def _ending(status: int, said: str) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    last = [line.strip() for line in said.splitlines() if line.strip()][-1:]
    return f"ended with status {status}{f' ({last[0][:200]})' if last else ''}"


def run_trials() -> None:
    """The child: runs the trials of its command line, telling the parent as it goes."""
    descriptor, trials = int(sys.argv[2]), json.loads(sys.argv[3])
    for name, argument in trials:
        os.write(descriptor, json.dumps({"begin": name}).encode() + b"\n")
        for row in one_trial(name, argument):
            os.write(descriptor, json.dumps(asdict(row)).encode() + b"\n")
    os._exit(0)  # libraries of CUDA and DALI may hang or crash while they are taken down


def one_trial(name: str, argument: str) -> list[Row]:
    """A trial, whatever it raises."""
    try:
        return TRIALS[name](argument)
    except Exception as error:  # an import, a driver, a library: a problem of its own, and the others go on
        if os.environ.get("TRACEBACK") == "1":
            raise
        reason = " ".join(str(error).split())[:200]
        return [Row(PROBLEM, name, f"{type(error).__name__}: {reason}", remedy=_MENDING)]


# ------------------------------------------------------------------------------------------- decoding, on the CPU


def dali_jpeg(_: str) -> list[Row]:
    """DALI's JPEG decoder in a decode worker's way, against PIL."""
    import numpy as np
    from PIL import Image

    from pipelines.dali import JpegSlicer

    file = io.BytesIO()
    Image.fromarray(_pictures()[0]).save(file, "JPEG", quality=95)
    (found,) = JpegSlicer(1).slice([file.getvalue()], [(0, 0, SIDE, SIDE)])
    if isinstance(found, ValueError):
        raise found
    difference = float(np.abs(found.astype(int) - np.asarray(Image.open(file), int)).mean())
    return [_compared("DALI, CPU", f"DALI {version('nvidia-dali-cuda130')} decodes JPEG as PIL does", difference)]


def ffmpeg(_: str) -> list[Row]:
    """Encoders and decoders of the profiles, through PyAV: a small video is stored and read back by each."""
    import numpy as np

    from pipelines.encode import FrameChoice, encode_video
    from pipelines.video import decode_file
    from tools.make_motion_videos import encode_mp4

    pictures, works, broken = _pictures(), [], []
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        source = Path(folder, "source.mp4")
        encode_mp4(source, pictures)
        for profile, encoder in (("jpeg", "mjpeg"), ("h264", "libx264"), ("hevc", "libx265")):
            try:
                stored = encode_video(source, profile, choice=FrameChoice()).data
                difference = np.abs(decode_file(stored, range(FRAMES)).astype(int) - pictures).mean()
                if difference > PICTURES_DIFFER:
                    raise ValueError(f"other pictures came back, {difference:.0f} levels off")
                works.append(f"{profile} ({encoder})")
            except (ValueError, OSError) as error:
                broken.append(f"{profile} ({encoder}): {' '.join(str(error).split())[:120]}")
    name, found = "FFmpeg, CPU", f"PyAV {version('av')} stores and decodes {', '.join(works)}"
    if "jpeg (mjpeg)" not in works:
        return [Row(PROBLEM, name, "; ".join(broken), remedy=f"{SETUP}: PyAV's wheel carries its own FFmpeg")]
    if broken:
        cost = "pack with --profile jpeg, the default: 1.35 times the source's bytes, and the fastest to decode"
        return [Row(FALLBACK, name, f"{found}; not {'; '.join(broken)}", cost, f"{SETUP}: another PyAV is installed")]
    return [Row(OK, name, found)]


# ------------------------------------------------------------------------------------------- the GPU


def has_cuda() -> bool:
    """Whether torch can compute on a GPU."""
    import torch

    return torch.cuda.is_available()


def gpu(_: str) -> list[Row]:
    """Which GPUs there are, and whether torch and the driver agree."""
    import torch

    from tools.gpu_machine import driver
    from tools.gpu_machine import gpu as gpu_facts

    facts, seen = gpu_facts(), driver()
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    if facts is None and seen:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={hidden} hides it" if hidden is not None else f"{built}: the driver may be too old"
        remedy = (
            "unset CUDA_VISIBLE_DEVICES" if hidden is not None else "install a driver for that CUDA (13: 580 or newer)"
        )
        return [Row(FALLBACK, "GPU", f"the driver shows {seen}, torch sees none; {why}", STEP_ON_CPU, remedy)]
    if facts is None:
        remedy = "a CUDA machine for more than small models; no setting changes"
        return [Row(FALLBACK, "GPU", f"none ({built})", STEP_ON_CPU, remedy)]
    found = (
        f"{facts['count']} × {facts['name']}, {facts['memory_bytes'] / 1e9:.0f} GB, compute capability "
        f"{facts['capability']}, CUDA {facts['cuda']}; driver: {seen or 'unknown'}"
    )
    if int(facts["capability"].split(".")[0]) < 8:
        cost = "it has no bfloat16 units, which the recipes compute in; unmeasured"
        return [Row(FALLBACK, "GPU", found, cost, "--set ds.torch_autocast.enabled=false computes in float32")]
    return [Row(OK, "GPU", found)]


def nvjpeg(_: str) -> list[Row]:
    """DALI's JPEG graph on the device, against the CPU's."""
    name = "nvJPEG"
    if not has_cuda():
        cost = f"worker processes, {decode_rates('jpeg')}"
        return [Row(FALLBACK, name, "not tried: no CUDA device", cost)]
    import numpy as np
    from PIL import Image

    from pipelines.dali import JpegCropper
    from tools.gpu_machine import LIBRARIES, find_library

    file = io.BytesIO()
    Image.fromarray(_pictures()[0]).save(file, "JPEG", quality=95)
    try:
        cropper = JpegCropper(SIDE, 1, gpu=0)
        crops = _numpy(cropper.crop([file.getvalue()], [(0, 0, SIDE, SIDE)], [False]))
    except (ValueError, RuntimeError) as error:
        library = find_library(LIBRARIES["nvjpeg"])
        remedy = f"{SETUP}, which has nvidia-nvjpeg; until then pack with --profile h264"
        return [Row(PROBLEM, name, f"DALI cannot decode: {str(error)[:150]}; library: {library}", remedy=remedy)]
    difference = float(np.abs(crops[0].astype(int) - np.asarray(Image.open(file), int)).mean())
    return [_compared(name, "DALI decodes JPEG on the GPU as PIL does", difference)]


def nvdec(_: str) -> list[Row]:
    """DALI's video graph on the device, against FFmpeg. Training does not use it yet."""
    name = "NVDEC"
    cost = f"worker processes for h264, {decode_rates('h264')}"
    if not has_cuda():
        return [Row(FALLBACK, name, "not tried: no CUDA device", cost)]
    import numpy as np

    from pipelines.dali import VideoCropper
    from pipelines.encode import FrameChoice, encode_video
    from pipelines.video import decode_file
    from tools.gpu_machine import LIBRARIES, find_library
    from tools.make_motion_videos import encode_mp4

    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        source = Path(folder, "source.mp4")
        encode_mp4(source, _pictures())
        stored = encode_video(source, "h264", choice=FrameChoice()).data
    try:
        cropper = VideoCropper(SIDE, 1, gpu=0)
        (found,) = cropper.crop([stored], [[0, 5]], [(0, 0, SIDE, SIDE)], [False])
    except (ValueError, RuntimeError) as error:
        library = find_library(LIBRARIES["nvcuvid"])
        remedy = "in a container, NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        return [Row(FALLBACK, name, f"DALI cannot decode: {str(error)[:150]}; library: {library}", cost, remedy)]
    difference = float(np.abs(_numpy(found).astype(int) - decode_file(stored, [0, 5])).mean())
    return [_compared(name, "DALI decodes H.264 on the GPU as FFmpeg does (training does not use it yet)", difference)]


def attention(_: str) -> list[Row]:
    """xformers' operators, forward and backward, in bf16; on a CPU PyTorch's own."""
    import torch

    from model.attention import attention as compute
    from model.attention import attention_backend

    on_gpu = has_cuda()
    device, backend = torch.device("cuda" if on_gpu else "cpu"), "xformers" if on_gpu else "auto"
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, SIDE, 4, SIDE, generator=generator).to(device, torch.bfloat16) for _ in range(3)]
    try:
        found = _with_gradient(compute, inputs, backend)
    except Exception as error:  # its own kinds, and those of CUDA
        reason = " ".join(str(error).split())[:150]
        cost = "PyTorch's SDPA computes instead; what that costs is unmeasured"
        return [Row(FALLBACK, "attention", f"xformers fails: {reason}", cost, SETUP)]
    wanted = _with_gradient(compute, [x.cpu().float() for x in inputs], "sdpa")
    off = max(((a.cpu().float() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))
    if not off < 0.05:
        remedy = "--set speed.attention=sdpa"
        return [Row(PROBLEM, "attention", f"{backend} is off by {off:.2g} of the largest value", remedy=remedy)]
    who = attention_backend(device, biased=False)
    why = "" if on_gpu else " (xformers, Triton: CUDA only)"
    return [Row(OK, "attention", f"{who}, forward and backward in bf16{why}")]


def triton(_: str) -> list[Row]:
    """Our kernel for short sequences."""
    if not has_cuda():
        return []  # the row of attention says so
    import torch

    from model.attention import attention as compute

    q, k, v = (torch.randn(2, 8, 67, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    try:
        compute(q, k, v, backend="short")  # is tried out, forward and backward, before it is used
    except Exception as error:
        cost = "xformers computes short sequences too; what that costs is unmeasured"
        remedy = "a C compiler, and a HOME that can be written: Triton compiles at its first use"
        return [Row(FALLBACK, "Triton kernel", " ".join(str(error).split())[:200], cost, remedy)]
    return [Row(OK, "Triton kernel", "short sequences, forward and backward in bf16, as plain products give")]


# ------------------------------------------------------------------------------------------- DeepSpeed


def deepspeed(_: str) -> list[Row]:
    """Joins a world of one process, as a run does; builds nothing that would take long."""
    name, found = "DeepSpeed", version("deepspeed")
    if not has_cuda() and (row := operator_row(found)) is not None:
        return [row]
    import torch.distributed as dist

    from train.engine import start_world

    begin = time.monotonic()
    world = start_world()
    backend = dist.get_backend()
    dist.destroy_process_group()
    operator = ", its operator is built" if world.device.type == "cpu" else ""
    took = time.monotonic() - begin
    return [Row(OK, name, f"{found} joins on {world.device.type} by {backend} in {took:.1f} s{operator}")]


def operator_row(found: str) -> Row | None:
    """What stands in the way of DeepSpeed's operator for CPU communication; None if it is built."""
    import torch
    from torch.utils.cpp_extension import _get_build_directory, get_cxx_compiler

    from train.engine import STALE_BUILD_SECONDS

    folder = Path(_get_build_directory("deepspeed_shm_comm", False))
    lock = folder / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > STALE_BUILD_SECONDS:
        text = f"{found}; an earlier build of its operator was cut off, and every start waits for it"
        return Row(PROBLEM, "DeepSpeed", text, remedy=f"rm -r {folder}; the next start builds it")
    if lock.exists():
        text = f"{found}; its operator is being built, by another process"
        return Row(FALLBACK, "DeepSpeed", text, "every start waits for that; not tried here", "look again in a minute")
    text = f"{found}; its operator for CPU communication is not built"
    remedy = "nothing need be done; let one process start first, for several wait for the one that builds"
    if (folder / "deepspeed_shm_comm.so").exists():
        recipe = (folder / "build.ninja").read_text(encoding="utf-8")
        if f"-isystem {Path(torch.__file__).parent}/include" in recipe:
            return None
        text = f"{found}; its operator was built under another path of this environment"
        remedy = f"keep to one path of this environment, such as {Path(sys.executable).parent}"
    if shutil.which(get_cxx_compiler()) is None:
        remedy = "apt-get install g++"
        return Row(PROBLEM, "DeepSpeed", f"{text}, and there is no C++ compiler", remedy=remedy)
    cost = "the next start builds it, half a minute or more; not tried here"
    return Row(FALLBACK, "DeepSpeed", text, cost, remedy)


# ------------------------------------------------------------------------------------------- data


def shard_set(path: str) -> list[Row]:
    from tools.parts.doctor_data import set_rows

    return set_rows(Path(path), has_cuda())


def videos(path: str) -> list[Row]:
    from tools.parts.doctor_data import video_rows

    return video_rows(Path(path))


TRIALS: dict[str, Callable[[str], list[Row]]] = {
    "DALI, CPU": dali_jpeg,
    "FFmpeg, CPU": ffmpeg,
    "GPU": gpu,
    "nvJPEG": nvjpeg,
    "NVDEC": nvdec,
    "attention": attention,
    "Triton kernel": triton,
    "DeepSpeed": deepspeed,
    "set": shard_set,
    "videos": videos,
}
"""Name → trial, which takes an argument (a path, of the last two)."""


def _pictures() -> Any:
    """A few frames uint8 [FRAMES, SIDE, SIDE, 3]: a square wanders over a gradient."""
    import numpy as np

    ramp = np.linspace(40, 200, SIDE, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(90)), axis=-1)
    pictures = np.repeat(picture[None], FRAMES, axis=0)
    for i in range(FRAMES):
        pictures[i, 8 : 8 + SIDE // 4, 4 * i : 4 * i + SIDE // 4] = (220, 60, 120)
    return pictures


def _compared(name: str, found: str, difference: float) -> Row:
    if difference > PICTURES_DIFFER:
        text = f"it decodes another picture, {difference:.0f} levels of 255 off on average"
        return Row(PROBLEM, name, text, remedy=_MENDING)
    return Row(OK, name, found)


def _numpy(array: Any) -> Any:
    """Of a torch tensor on any device, or of what NumPy takes."""
    import numpy as np

    return array.cpu().numpy() if hasattr(array, "cpu") else np.asarray(array)


def _with_gradient(compute: Callable[..., Any], inputs: Sequence[Any], backend: str) -> list[Any]:
    """Attention's result, and the gradients of its inputs for the sum of squares."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = compute(*leaves, backend=backend)
    out.float().square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]
