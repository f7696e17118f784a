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
from collections.abc import Callable, Mapping, Sequence
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

# (step, rows of the batch) -> scalar mean loss over these rows, and numbers to log (tensors are read when they are)
LossFunction = Callable[[int, slice], tuple[Tensor, Mapping[str, float | Tensor]]]
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


def device_rng(seed: int, purpose: str, step: int, device: torch.device) -> torch.Generator:
    """The same, for random numbers that are drawn where they are used; those of a GPU differ from a CPU's."""
    return torch.Generator(device).manual_seed(int(rng(seed, purpose, step).integers(2**62)))


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
    loss_limit: float = math.inf,
) -> dict[str, Tensor]:
    """Train `module` for `config.steps` steps and return its averaged parameters.

    Writes `directory/<name>.safetensors` every `checkpoint_every` steps (atomically: a killed run keeps the last one)
    and one line per 20 steps to `directory/<name>.jsonl`, and to TensorBoard files where that package is installed.
    `fingerprint` identifies configuration and data: a checkpoint of another one is refused. Of several processes each
    computes its rows of the batch, and the first one writes. `after_step` is called when the parameters have moved, and
    returns numbers to log. Raises `TrainingError` on a checkpoint that must not be
    overwritten and on a loss or gradient that is not finite, or a loss above `loss_limit` (the last checkpoint is kept
    and named). A GPU is not waited for at every step: there, losses are looked at every 20 steps and before anything is
    written.
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
    unread: list[tuple[int, Tensor, Tensor]] = []  # step, loss and gradient norm that nobody looked at yet
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
            norm = nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
            done = step + 1
            saving = done % config.checkpoint_every == 0 or done == config.steps
            showing = preview is not None and config.preview_every > 0 and done % config.preview_every == 0
            logging = step % 20 == 0 or done == config.steps or showing
            unread.append((step, torch.as_tensor(numbers["loss"], dtype=torch.float64, device=norm.device), norm))
            if saving or logging or team.device.type == "cpu":
                _check(name, unread, loss_limit, checkpoint)
                unread.clear()
            optimizer.step()
            numbers |= after_step(step)
            if adversary is not None and step >= adversary.start:
                rival.zero_grad(set_to_none=True)
                found = _gradients(adversary.module, adversary.loss_function, step, config, team)
                rival.step()
                numbers |= {"discriminator": found.pop("loss"), **found}
            ema.update(module, step)
            if log is not None:
                figures: Mapping[str, float] = {}
                if showing and preview is not None:
                    with ema.applied(module):
                        figures = preview(module, done)
                if logging:
                    read = {key: float(value) for key, value in numbers.items()}
                    log.write({"step": step, **read, **figures, "gradient_norm": norm.item(),
                               "learning_rate": rate, "seconds": round(time.monotonic() - began, 1)})  # fmt: skip
                if saving:
                    _save(checkpoint, fingerprint, done, trained, ema)
            advance(1)
    if log is not None:
        log.close()
    team.wait()
    return ema.state()


def _check(name: str, unread: Sequence[tuple[int, Tensor, Tensor]], limit: float, checkpoint: Path) -> None:
    """Raises `TrainingError` at the first step whose loss or gradient must not be used."""
    values = torch.stack([value.detach().double() for _, loss, norm in unread for value in (loss, norm)]).tolist()
    for (step, _, _), loss, norm in zip(unread, values[::2], values[1::2], strict=True):
        for what, value, allowed in (("loss", loss, limit), ("gradient norm", norm, math.inf)):
            if math.isfinite(value) and value <= allowed:
                continue
            kept = f"the last good state is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
            above = f", above {limit:g}: training diverges" if math.isfinite(value) else ""
            raise TrainingError(
                f"{name}: the {what} is {value:g} at step {step}{above}; {kept}. "
                "Lower learning_rate or set autocast_bf16 = false, then resume"
            )


def _gradients(
    module: nn.Module, loss_function: LossFunction, step: int, config: StageConfig, team: Processes
) -> dict[str, float | Tensor]:
    """Leave the gradient of the whole batch's mean loss in the parameters; returns loss and other means, which are
    float64 tensors where reading them would mean waiting for the device."""
    totals: dict[str, float | Tensor] = {}
    for rows in team.parts(config.batch_size, config.accumulation):
        share = (rows.stop - rows.start) / config.batch_size
        loss, numbers = loss_function(step, rows)
        (loss * share).backward()
        for key, value in {"loss": loss, **numbers}.items():
            given = value.detach().double() if isinstance(value, Tensor) else value
            totals[key] = totals.get(key, 0.0) + share * given
    if team.count > 1:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        means = torch.tensor([float(value) for value in totals.values()], dtype=torch.float64, device=team.device)
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
