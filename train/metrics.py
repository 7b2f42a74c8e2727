"""What a run writes down: metrics.jsonl (one JSON object a line), TensorBoard, and a line for people."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pipelines.shards import write_durably
from train.clock import Pace
from train.run_folder import METRICS

FEW_CLASSES = 5


class MetricsLog:
    """Appends to the logs of a run that stands at `step`; what an earlier process wrote of later steps is removed."""

    def __init__(self, out: Path, step: int) -> None:
        path = out / METRICS
        kept = _lines_up_to(path, step) if path.exists() else []
        self.evaluated = any((line := json.loads(text)).get("kind") == "eval" and line["step"] == step for text in kept)
        """Whether what was written before holds the evaluation after `step`."""
        if path.exists():
            write_durably(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line at a time
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, **values: float | None) -> None:
        """One line of metrics.jsonl; the numbers go to TensorBoard as <kind>/<name>."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def train_line(*, step: int, num_steps: int, epoch: float, loss: float, lr: float, pace: Pace, whole: Pace) -> str:
    """The line for people; `pace` since the last line, `whole` for the time left."""
    text = f"step {step}/{num_steps}  epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.2e}"
    if not pace.steps:
        return text
    share = 100 * pace.waiting_seconds / pace.seconds
    left = timedelta(seconds=round((num_steps - step) * whole.seconds / whole.steps))
    return (
        f"{text}  {pace.clips / pace.seconds:.1f} clips/s  {1000 * pace.seconds / pace.steps:.0f} ms a step, "
        f"waiting {1000 * pace.waiting_seconds / pace.steps:.1f} ms ({share:.1f} %)  left {left}"
    )


def counted(number: int, noun: str, plural: str = "s") -> str:
    """A number and its noun, for people."""
    return f"{number} {noun}{plural * (number != 1)}"


def eval_line(step: int, metrics: dict[str, float], num_classes: int) -> str:
    """The evaluation line for people."""
    return f"evaluation after step {step}: {metrics_text(metrics, num_classes)}"


def metrics_text(metrics: dict[str, float], num_classes: int | None = None) -> str:
    """What `Evaluation.metrics` returned, for people; of few classes (`FEW_CLASSES`) without top-5, which is 100 %."""
    titles = {"mean_average_precision": "mAP", "top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class"}
    if num_classes is not None and num_classes <= FEW_CLASSES:
        del titles["top5"]
    shares = "  ".join(f"{title} {100 * metrics[name]:.2f} %" for name, title in titles.items() if name in metrics)
    skipped = f", {metrics['undecodable']:.0f} could not be decoded" if metrics["undecodable"] else ""
    return f"{shares}  loss {metrics['loss']:.4f}  ({metrics['samples']:.0f} samples{skipped})"


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of steps up to `step`; a killed process may have left half a line."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and entry["step"] <= step:
            kept.append(line)
    return kept
