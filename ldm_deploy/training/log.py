"""The log of a training stage: JSON lines, and TensorBoard event files where that package is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_deploy.artifact import atomic_write_bytes


class TrainingLog:
    """Goes on at step `start`: what an earlier run logged after its checkpoint is about to be done again, and dropped.

    Lines go to `directory/<name>.jsonl`, scalars to `directory/tensorboard/<name>`.
    """

    def __init__(self, directory: Path, name: str, start: int) -> None:
        self.path = directory / f"{name}.jsonl"
        lines = self.path.read_text("utf-8").splitlines(keepends=True) if self.path.exists() else []
        # A line that was cut off has no end.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < start]
        if kept != lines:
            atomic_write_bytes(self.path, "".join(kept).encode())
        self._board: Any = None
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(directory / "tensorboard" / name), purge_step=start)

    def write(self, line: Mapping[str, float]) -> None:
        """Append one line; `step` is its place on the axis."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for key, value in line.items():
                if key != "step":
                    self._board.add_scalar(key, value, line["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
