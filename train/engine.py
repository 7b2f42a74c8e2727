"""The one door to DeepSpeed: processes, device, gradient accumulation and averaging, clipping, the optimizer step.

DeepSpeed runs at ZeRO stage 0 with a client `torch.optim.AdamW`, which it then calls as it is: with bf16 by
`torch_autocast` the trainable weights stay the float32 parameters of the model, gradients are float32, are averaged in
float32, and no copy of the weights is made. The model chooses the precision of its tokens itself.

DeepSpeed is imported only after the environment is set up, for its import already chooses an accelerator and a logger.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.video import VideoModel
from train.config import Batch, OptimizerConfig

STALE_BUILD_SECONDS = 600.0  # building the operator takes about a minute


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int
    local_size: int
    """Processes on this machine."""
    device: torch.device

    def on_first(self, action: Callable[[], object]) -> None:
        """Runs `action` on rank 0 alone; if it raises ValueError or OSError there, all ranks raise."""
        error: Exception | None = None
        if self.rank == 0:
            try:
                action()
            except (ValueError, OSError) as failure:
                error = failure
        failed = torch.tensor([float(error is not None)], device=self.device)
        dist.broadcast(failed, src=0)
        if error is not None:
            raise error
        if failed.item():
            raise ValueError("rank 0 could not go on; it says why")

    def gather(self, text: str) -> list[str]:
        """What every process says, by rank; all call it together."""
        if self.size == 1:
            return [text]
        said = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(said)], device=self.device))
        longest = int(max(lengths))
        texts = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(said, (0, longest - len(said))))
        return [bytes(t[: int(n)].tolist()).decode() for t, n in zip(texts, lengths, strict=True)]

    def agree(self, failure: Exception | None) -> None:
        """All call it together: if one of them failed, all raise, the others a ValueError of the same text."""
        texts = self.gather(json.dumps(None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        for text in map(json.loads, texts):
            if text is not None:
                raise ValueError(text)

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def start_world() -> World:
    """Joins the processes that `deepspeed` (or torchrun) started, or makes a world of one.

    Raises ValueError when there are too few GPUs, or DeepSpeed's operator for CPU communication cannot be had.
    """
    env = os.environ
    alone = "RANK" not in env
    local_size = int(env.get("LOCAL_SIZE") or env.get("LOCAL_WORLD_SIZE") or 1)
    if alone:
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        env.update({name: str(value) for name, value in place.items()})
    local_rank = int(env.get("LOCAL_RANK", "0"))
    device = _choose_device(local_rank, local_size)
    if "OMP_NUM_THREADS" not in env:  # else every process would take all cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"  # where ninja is
    if device.type == "cpu":
        env["DS_ACCELERATOR"] = "cpu"
    for noisy in ("torch.utils.cpp_extension", "torch.distributed.distributed_c10d"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with _silence():
        import deepspeed
    if device.type == "cpu":
        _build_operator()
    try:
        with _silence():
            deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"port {env['MASTER_PORT']} is in use, by another training perhaps: choose another port, "
                "deepspeed --master_port 29501 …"
            ) from error
        raise ValueError(f"the processes cannot find each other: {error}") from error
    _unlink_buffer()
    return World(dist.get_rank(), dist.get_world_size(), local_size, device)


class Engine:
    """The model under DeepSpeed."""

    def __init__(
        self,
        world: World,
        model: VideoModel,
        settings: OptimizerConfig,
        deepspeed_document: Mapping[str, Any],
        batch: Batch,
        max_skipped: int = 10,
    ) -> None:
        """After more than `max_skipped` steps in a row that had to be skipped, all later ones are."""
        import deepspeed

        model.to(world.device)
        self.optimizer = torch.optim.AdamW(
            model.optimizer_groups(settings.weight_decay, settings.backbone_lr),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=True if world.device.type == "cuda" else None,
        )
        if world.device.type == "cpu":
            self.optimizer.register_step_pre_hook(self._leave_out)
        self._max_skipped = max_skipped
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._statistics = list(model.extra_tensors().values())
        self._before: list[Tensor] | None = None  # the statistics as they were when the step began
        self._in_a_row = torch.zeros((), device=world.device)
        self.skipped = torch.zeros((), device=world.device)
        """Scalar float32: 1 if the last step was skipped, else 0."""
        document = {
            **deepspeed_document,
            "train_micro_batch_size_per_gpu": batch.micro,
            # Its throughput timer waits for the device twice a micro-batch; ours does so only when logging.
            "timers": {"throughput": {"enabled": False}},
        }
        with _silence():
            self._engine, used, _, _ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=document)
        assert used is self.optimizer, f"DeepSpeed wrapped the optimizer in {type(used).__name__}"
        assert self._engine.gradient_accumulation_steps() == batch.accumulation

    def __call__(self, frames: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """Logits of a training micro-batch."""
        if self._before is None:
            self._before = [tensor.clone() for tensor in self._statistics]
        logits: Tensor = self._engine(frames, masks)
        return logits

    def accumulate(self, micro_batches: int) -> None:
        """From the next step on, a step takes so many micro-batches: for measurements, between two steps."""
        engine = self._engine
        engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch.

        A loss that is no finite number makes all gradients NaN, even where they could be computed; another is not
        changed by the factor, which is 1 then.
        """
        self._engine.backward(loss * (1 + (loss - loss).detach()))

    def update(self, lr: float) -> None:
        """Ends a micro-batch; after the last one of a step clips the averaged gradients and steps the optimizer.

        `lr` is the head's; a group of parameters multiplies it by its own `lr_scale`. Where a gradient is no finite
        number the step is skipped: weights, optimizer state and running statistics stay as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self._engine.is_gradient_accumulation_boundary():
            self._judge()
        self._engine.step()

    def _judge(self) -> None:
        """Has the step that ends skipped if it must be; on CUDA the device decides, and the host does not wait."""
        found = torch.zeros_like(self.skipped)
        gradients = [p.grad for p in self._trained if p.grad is not None]
        # What GradScaler uses: one pass over the gradients, which the factor 1 leaves as they are.
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones_like(found))
        self.skipped = torch.maximum(found, (self._in_a_row > self._max_skipped).float())
        self._in_a_row = (self._in_a_row + 1) * self.skipped
        for now, before in zip(self._statistics, self._before or (), strict=True):
            now.copy_(torch.where(self.skipped > 0, before, now))
        self._before = None
        if self.skipped.is_cuda:
            self.optimizer.found_inf = self.skipped  # type: ignore[attr-defined]  # the fused AdamW looks at it

    def _leave_out(self, *_: object) -> None:
        """On the CPU, right before the optimizer's step, after clipping, which wants gradients: AdamW leaves alone what
        has none."""
        if self.skipped.item():
            for parameter in self._trained:
                parameter.grad = None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor there; on a CPU, or where it is already, itself.

    To CUDA it goes by way of pinned memory: then the host waits for nothing but its own copy, and the tensor's memory
    may be used again at once.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _choose_device(local_rank: int, local_size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > torch.cuda.device_count():
        raise ValueError(
            f"{local_size} processes on this machine and {torch.cuda.device_count()} GPUs: start as many as there are "
            "(deepspeed --num_gpus N)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _build_operator() -> None:
    """Has DeepSpeed compile its operator for CPU communication if that has not been done; needs a C++ compiler once.

    It is loaded even for one process. A build that was killed leaves a lock which all later ones wait for.
    """
    from deepspeed.comm.torch import build_shm_op
    from torch.utils.cpp_extension import _get_build_directory, get_cxx_compiler

    folder = Path(_get_build_directory("deepspeed_shm_comm", False))
    lock = folder / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > STALE_BUILD_SECONDS:
        raise ValueError(f"an earlier build of DeepSpeed's operator was cut off; delete {folder} and start again")
    if not (folder / "deepspeed_shm_comm.so").exists():
        if shutil.which(get_cxx_compiler()) is None:
            raise ValueError(
                f"DeepSpeed must build a small operator once, and there is no C++ compiler ({get_cxx_compiler()}): "
                "apt-get install g++, then make setup"
            )
        print("building DeepSpeed's operator for CPU communication (once, about a minute)", file=sys.stderr)
    try:
        with _silence():
            build_shm_op()
    except Exception as error:  # the compiler, ninja and the loader each raise their own kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"DeepSpeed cannot build its operator for CPU communication ({reason}); "
            f"run make setup, which says what is missing, or delete {folder} and start again"
        ) from error


def _unlink_buffer() -> None:
    """Removes the name of the 66 MB that DeepSpeed shares between processes on CPUs, which it leaves behind for ever.

    All have mapped it by then, and the memory lives as long as they do.
    """
    dist.barrier()
    env = os.environ
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{env['MASTER_ADDR']}_{env['MASTER_PORT']}_{dist.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """DeepSpeed prints what it builds and logs what it chooses; warnings of trouble still come through its logger."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
