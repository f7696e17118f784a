"""Low-rank adapters of the U-Net's attention, through peft: few parameters to train, none left after merging.

Hu et al. 2021, arXiv:2106.09685, section 4.1: W + B A, with B (out, rank) starting at zero and A (rank, in).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm_deploy.errors import TrainingError

ATTENTION = ("to_q", "to_k", "to_v", "to_out")


def add_lora(unet: nn.Module, rank: int) -> None:
    """Give every attention layer of `unet` an adapter of rank `rank`, the only thing left to train.

    The adapters start as zero: the outputs do not change. Raises `TrainingError` if peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise TrainingError(
            f"lora_rank is {rank} and peft is not installed; install ldm_deploy[train], or set lora_rank = 0"
        ) from None
    # lora_alpha = r: the adapter counts once (alpha / r of section 4.1 is 1).
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION)), unet)


@torch.no_grad()
def merged_state(unet: nn.Module) -> dict[str, Tensor]:
    """The weights of `unet` with its adapters added, under the names of a U-Net without; `unet` stays as it is."""
    state = unet.state_dict()
    if not any(".lora_" in key for key in state):
        return state
    from peft.tuners.lora import LoraLayer

    adapted: dict[str, Any] = {name: layer for name, layer in unet.named_modules() if isinstance(layer, LoraLayer)}
    merged = {}
    for key, value in state.items():
        owner, _, part = key.rpartition(".base_layer.")
        if owner in adapted:
            delta = adapted[owner].get_delta_weight("default") if part == "weight" else 0
            merged[f"{owner}.{part}"] = value + delta
        elif ".lora_" not in key:
            merged[key] = value
    return merged
