"""The loop both training stages share: optimizer, learning rate, EMA, checkpoints, log.

All randomness of step s comes from generators seeded with (seed, s), so a resumed run draws what the uninterrupted one
would have drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_deploy.artifact import atomic_write_bytes
from ldm_deploy.config import StageConfig
from ldm_deploy.errors import TrainingError
from ldm_deploy.progress import task
from ldm_deploy.training.checkpointing import checkpoint_blocks
from ldm_deploy.training.ema import Ema
from ldm_deploy.training.log import TrainingLog
from ldm_deploy.training.processes import Processes, processes

# (step, rows of the batch) -> scalar mean loss over these rows, and numbers to log
LossFunction = Callable[[int, slice], tuple[Tensor, Mapping[str, float]]]
# (originals, reconstructions), both uint8 (n, H, W, 3) -> figures by name
Measure = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]
# (module with averaged parameters, step) -> numbers to log; may write files
Preview = Callable[[nn.Module, int], Mapping[str, float]]


@dataclass
class Adversary:
    """A network trained against the first: after each of its steps from `start` on, one step on `loss_function`."""

    module: nn.Module
    loss_function: LossFunction
    start: int
    learning_rate: float


def rng(seed: int, purpose: str, step: int) -> np.random.Generator:
    """The generator of one purpose at one step; independent across purposes and steps."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little"), step])


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero, both again at each restart.

    Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5.
    """
    bounds = (0, *config.restarts, config.steps)
    start, end = next((start, end) for start, end in itertools.pairwise(bounds) if step < end)
    warmup = min(1.0, (step - start + 1) / max(config.warmup_steps, 1))
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * (step - start) / (end - start)))


def run_stage(
    name: str,
    module: nn.Module,
    loss_function: LossFunction,
    config: StageConfig,
    directory: Path,
    fingerprint: str,
    *,
    resume: bool,
    preview: Preview | None = None,
    adversary: Adversary | None = None,
    after_step: Callable[[int], Mapping[str, float]] = lambda step: {},
) -> dict[str, Tensor]:
    """Train `module` for `config.steps` steps and return its averaged parameters.

    Writes `directory/<name>.safetensors` every `checkpoint_every` steps (atomically: a killed run keeps the last one)
    and one line per 20 steps to `directory/<name>.jsonl`, and to TensorBoard files where that package is installed.
    `fingerprint` identifies configuration and data: a checkpoint of another one is refused. Of several processes each
    computes its rows of the batch, and the first one writes. `after_step` is called when the parameters have moved, and
    returns numbers to log. Raises `TrainingError` on a checkpoint that must not be
    overwritten and on a loss or gradient that is not finite (the last checkpoint is kept and named).
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = directory / f"{name}.safetensors"
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
    )
    trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {"": (module, optimizer)}
    if adversary is not None:
        rival = torch.optim.Adam(
            adversary.module.parameters(), lr=adversary.learning_rate, betas=(0.5, 0.9), fused=True
        )
        trained["adversary."] = (adversary.module, rival)
    ema = Ema(module, config.ema_decay)
    if config.gradient_checkpointing:
        checkpoint_blocks(module)
    start = 0
    if checkpoint.exists():
        if not resume:
            raise TrainingError(
                f"{checkpoint} holds an earlier run of this stage; add --resume to continue it, or remove {directory}"
            )
        start = _restore(checkpoint, fingerprint, trained, ema)
    team = processes()
    if team.count > config.batch_size:
        raise TrainingError(f"{team.count} processes share a batch of {config.batch_size}; start fewer of them")
    team.wait()  # all have read the checkpoint before the first one writes the next
    log = TrainingLog(directory, name, start) if team.first else None
    began = time.monotonic()
    # torch's fused attention has a slow bf16 backward on a CPU: the plain one makes a U-Net step 1.3 times faster.
    attention = sdpa_kernel(SDPBackend.MATH) if team.device.type == "cpu" else contextlib.nullcontext()
    with attention, task(f"training {name}", config.steps, start) as advance:
        for step in range(start, config.steps):
            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            numbers = _gradients(module, loss_function, step, config, team)
            norm = nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm).item()
            for what, value in (("loss", numbers["loss"]), ("gradient norm", norm)):
                if not math.isfinite(value):
                    there = checkpoint.exists()
                    kept = f"the last good state is {checkpoint}" if there else "there is no checkpoint yet"
                    raise TrainingError(
                        f"{name}: the {what} is {value} at step {step}; {kept}. "
                        "Lower learning_rate or set autocast_bf16 = false, then resume"
                    )
            optimizer.step()
            numbers |= after_step(step)
            if adversary is not None and step >= adversary.start:
                rival.zero_grad(set_to_none=True)
                found = _gradients(adversary.module, adversary.loss_function, step, config, team)
                rival.step()
                numbers |= {"discriminator": found.pop("loss"), **found}
            ema.update(module, step)
            done = step + 1
            if log is not None:
                figures: Mapping[str, float] = {}
                if preview is not None and config.preview_every and done % config.preview_every == 0:
                    with ema.applied(module):
                        figures = preview(module, done)
                if step % 20 == 0 or done == config.steps or figures:
                    log.write({"step": step, **numbers, **figures, "gradient_norm": norm,
                               "learning_rate": rate, "seconds": round(time.monotonic() - began, 1)})  # fmt: skip
                if done % config.checkpoint_every == 0 or done == config.steps:
                    _save(checkpoint, fingerprint, done, trained, ema)
            advance(1)
    if log is not None:
        log.close()
    team.wait()
    return ema.state()


def _gradients(
    module: nn.Module, loss_function: LossFunction, step: int, config: StageConfig, team: Processes
) -> dict[str, float]:
    """Leave the gradient of the whole batch's mean loss in the parameters; returns loss and other means."""
    totals: dict[str, float] = {}
    for rows in team.parts(config.batch_size, config.accumulation):
        share = (rows.stop - rows.start) / config.batch_size
        loss, numbers = loss_function(step, rows)
        (loss * share).backward()
        for key, value in {"loss": loss.item(), **numbers}.items():
            totals[key] = totals.get(key, 0.0) + share * value
    if team.count > 1:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        means = torch.tensor(list(totals.values()), dtype=torch.float64, device=team.device)
        team.sum_([parameter.grad for parameter in parameters if parameter.grad is not None])
        team.sum_([means])
        totals = dict(zip(totals, means.tolist(), strict=True))
    return totals


# prefix in the checkpoint -> a network and its optimizer
Trained = Mapping[str, tuple[nn.Module, torch.optim.Optimizer]]
MOMENTS = ("exp_avg", "exp_avg_sq")


def _save(path: Path, fingerprint: str, steps_done: int, trained: Trained, ema: Ema) -> None:
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    metadata = {"steps_done": str(steps_done), "fingerprint": fingerprint}
    for prefix, (module, optimizer) in trained.items():
        for name, parameter in module.named_parameters():
            tensors[f"{prefix}model.{name}"] = parameter.detach().contiguous()
            state = optimizer.state.get(parameter)
            if state:  # none if it never had a gradient
                metadata[f"{prefix}steps"] = str(int(state["step"]))
                for key in MOMENTS:
                    tensors[f"{prefix}{key}.{name}"] = state[key].contiguous()
        for name, buffer in module.named_buffers():
            tensors[f"{prefix}buffer.{name}"] = buffer.contiguous()
    for name, average in ema.state().items():
        tensors[f"ema.{name}"] = average.contiguous()
    atomic_write_bytes(path, save(tensors, metadata=metadata))


def _restore(path: Path, fingerprint: str, trained: Trained, ema: Ema) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata.get("fingerprint") != fingerprint:
                raise TrainingError(
                    f"{path} was written with another configuration or other data; "
                    f"give those again to resume, or remove {path.parent} to start over"
                )
            names = set(file.keys())
            for prefix, (module, optimizer) in trained.items():
                for name, parameter in module.named_parameters():
                    parameter.data.copy_(file.get_tensor(f"{prefix}model.{name}"))
                    if f"{prefix}{MOMENTS[0]}.{name}" in names:
                        steps = float(metadata.get(f"{prefix}steps", metadata["steps_done"]))
                        optimizer.state[parameter] = {
                            "step": torch.tensor(steps, device=parameter.device),
                            **{
                                key: torch.empty_like(parameter).copy_(file.get_tensor(f"{prefix}{key}.{name}"))
                                for key in MOMENTS
                            },
                        }
                for name, buffer in module.named_buffers():
                    buffer.copy_(file.get_tensor(f"{prefix}buffer.{name}"))
            for name, average in ema.averages.items():
                average.copy_(file.get_tensor(f"ema.{name}"))
            return int(metadata["steps_done"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"checkpoint {path} is damaged ({error}); remove it to start the stage over") from None
