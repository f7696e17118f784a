"""What training.json says of a run: its command, data, device and stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.training.processes import processes

if TYPE_CHECKING:
    from ldm_deploy.training.data import ImageSet


def training_record(
    command: str, images: ImageSet, trained_on: int, logs: Mapping[str, Path], config: Mapping[str, Any]
) -> dict[str, Any]:
    """What every kind of training has in its record. `trained_on`: how many of the images; `logs`: stage -> its log."""
    import torch

    device = processes().device
    return {
        "command": command,
        "data": {
            "digest": images.digest,
            "images_trained_on": trained_on,
            "held_out": int(images.held_out.sum()),
        },
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "stages": {stage: summarise_log(log) for stage, log in logs.items()},
        "config": dict(config),
    }


def summarise_log(log: Path) -> dict[str, Any]:
    """Steps, time and last losses of a stage, from its log; the time of a resumed run is summed over its sittings."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    seconds = sum(
        line["seconds"]
        for line, following in zip(lines, [*lines[1:], None], strict=True)
        if following is None or following["seconds"] < line["seconds"]
    )
    tail = [line["loss"] for line in lines[-10:]]
    return {"steps": lines[-1]["step"] + 1, "minutes": round(seconds / 60, 1), "final_loss": sum(tail) / len(tail)}
