"""Does a reconstruction still mean the same? A small classifier, trained on originals, looks at reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.eval.metrics import bootstrap_ci
from ldm_deploy.progress import task

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 64
STEPS = 400


class GroupClassifier:
    """Three strided convolutions, an average over the pixels and a linear layer: image -> label.

    `images` uint8 (n, H, W, 3), one label each. Seeded: the same data give the same classifier on one machine. Raises
    `ValueError` for fewer than two different labels.
    """

    def __init__(self, images: np.ndarray, labels: Sequence[str], *, seed: int = 0, steps: int = STEPS) -> None:
        import torch
        from torch.nn import functional

        self.names = sorted(set(labels))
        if len(self.names) < 2:
            raise ValueError(f"a classifier needs two labels or more; got {self.names}")
        targets = torch.tensor([self.names.index(label) for label in labels])
        draw = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = _network(len(self.names))
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with task("training the classifier", steps) as advance:
            for _ in range(steps):
                rows = draw.integers(len(images), size=BATCH)
                batch = images[rows]
                flipped = draw.random(BATCH) < 0.5
                batch = np.where(flipped[:, None, None, None], batch[:, :, ::-1], batch)
                optimizer.zero_grad(set_to_none=True)
                functional.cross_entropy(self.network(_tensor(batch)), targets[torch.from_numpy(rows)]).backward()
                optimizer.step()
                schedule.step()
                advance()
        self.network.eval().requires_grad_(False)

    def predict(self, images: np.ndarray) -> list[str]:
        """uint8 (n, H, W, 3) -> one label each."""
        import torch

        found: list[str] = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                chosen = self.network(_tensor(images[start : start + BATCH])).argmax(1)
                found += [self.names[int(index)] for index in chosen]
        return found


def preservation(
    classifier: GroupClassifier, originals: np.ndarray, candidates: np.ndarray, labels: Sequence[str]
) -> dict[str, Any]:
    """Accuracy on originals and on their reconstructions, with 95 % intervals, and how often the two answers agree."""
    before, after = classifier.predict(originals), classifier.predict(candidates)
    right = [
        [float(found == label) for found, label in zip(answers, labels, strict=True)] for answers in (before, after)
    ]
    same = [float(a == b) for a, b in zip(before, after, strict=True)]
    return {
        "accuracy_originals": float(np.mean(right[0])),
        "accuracy": float(np.mean(right[1])),
        "accuracy_ci95": bootstrap_ci(right[1]),
        "agreement": float(np.mean(same)),
        "n": len(same),
        "reason": None,
    }


def _network(classes: int) -> nn.Module:
    from torch import nn

    layers: list[nn.Module] = []
    width = 3
    for wider in (32, 64, 128):
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider), nn.SiLU()]
        width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _tensor(images: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
