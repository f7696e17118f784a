"""Half precision that survives: overflow is planted, shown in torch, and repaired without retraining."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_deploy.eval.metrics import psnr_db
from ldm_deploy.eval.parity import relative_error
from ldm_deploy.export.graph import trace
from ldm_deploy.export.half import to_half
from ldm_deploy.export.ranges import scan_ranges
from ldm_deploy.export.rescale import LARGEST, MARGIN, rescale
from ldm_deploy.models.autoencoder import Autoencoder
from ldm_deploy.models.components import VaeDecoder

AXES = {"latent": {0: "batch", 2: "H", 3: "W"}}
LATENTS = [{"latent": np.random.default_rng(seed).standard_normal((2, 4, 6, 8), np.float32)} for seed in range(3)]


def decoder(layout: str = "sd1") -> VaeDecoder:
    torch.manual_seed(0)
    module = Autoencoder(ch=16, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, norm_groups=8, layout=layout)
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return VaeDecoder(module).eval().requires_grad_(False)


def planted(factor: float, names: tuple[str, ...]) -> VaeDecoder:
    """Weights ahead of a norm made so large that what they give has no place in fp16."""
    module = decoder()
    found = 0
    for name, layer in module.autoencoder.decoder.named_modules():
        if isinstance(layer, nn.Conv2d) and name.endswith(names):
            layer.weight.mul_(factor)
            found += 1
    assert found
    return module


def run(module: nn.Module, sample: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return module(*(torch.from_numpy(value) for value in sample.values())).numpy()


BROKEN = {
    "inside residual blocks": (1e6, ("conv1",)),
    "the residual stream": (2e5, ("layers.0", "conv2", "shortcut")),
}


@pytest.mark.parametrize("where", BROKEN)
def test_planted_overflow_is_shown_in_torch_and_repaired_there(where: str) -> None:
    module = planted(*BROKEN[where])
    with torch.no_grad():
        plain = copy.deepcopy(module).half()(torch.from_numpy(LATENTS[0]["latent"]).half()).float().numpy()
    assert not np.isfinite(plain).all()
    halved, _ = to_half(module, LATENTS, AXES, "fp16", repair=False)
    assert not np.isfinite(run(halved, LATENTS[0])).all()

    repaired, report = to_half(module, LATENTS, AXES, "fp16")
    for sample in LATENTS:
        expected = run(module, sample)
        assert psnr_db(expected, run(repaired, sample), peak=float(np.ptp(expected.astype(np.float64)))) > 50
    assert report.rescaled
    assert all(entry.largest > LARGEST / MARGIN for entry in report.rescaled)
    assert all("conv" in entry.tensor or "add" in entry.tensor for entry in report.rescaled)
    assert all(reason == "statistics of a norm" for reason in report.kept.values())  # nothing else had to stay
    first, size = next(iter(report.largest.items()))
    assert size > LARGEST
    assert "decoder" in first


@pytest.mark.parametrize("where", BROKEN)
def test_rescaling_changes_nothing_in_fp32(where: str) -> None:
    module = planted(*BROKEN[where])
    graph = trace(module, LATENTS[0], AXES)
    scan = scan_ranges(graph, LATENTS)
    scaled = rescale(graph, scan)
    assert scaled
    after = scan_ranges(graph, LATENTS)
    for sample in LATENTS:
        with torch.no_grad():
            found = graph(torch.from_numpy(sample["latent"])).numpy()
        # Powers of two are exact; only eps beside a variance of another size rounds differently.
        assert relative_error(run(module, sample), found) < 5e-6
    values = [node.name for node in graph.graph.nodes if node.op == "call_function"]
    assert max(after[name] for name in values if name in after) <= LARGEST / MARGIN
    assert max(scan[name] for name in values if name in scan) > LARGEST


class Unrepairable(nn.Module):
    """A product of two large values, which no norm follows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x) * 300
        return h * h / 1e6


def test_what_cannot_be_repaired_stays_in_fp32_and_is_named() -> None:
    torch.manual_seed(0)
    module = Unrepairable().eval().requires_grad_(False)
    samples = [{"x": np.full((2, 4), 3.0, np.float32)}]
    halved, _ = to_half(module, samples, {}, "fp16", repair=False)
    assert not np.isfinite(run(halved, samples[0])).all()
    repaired, report = to_half(module, samples, {}, "fp16")
    assert relative_error(run(module, samples[0]), run(repaired, samples[0])) < 5e-3
    assert report.rescaled == []
    assert any(name.startswith("mul") and "is beyond" in reason for name, reason in report.kept.items())
    assert not any("linear" in name for name in report.kept)


class Timestep(nn.Module):
    """999 has no place in bf16, which would make 1000 of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angle = timestep.float()[:, None] * torch.tensor([1.0, 0.5])
        return self.inner(x) + torch.sin(angle)


def test_it_computes_where_it_is_moved_to_though_it_was_traced_on_the_cpu() -> None:
    """A timestep embedding makes its frequencies itself; "meta" stands for a GPU."""

    class Embedding(nn.Module):
        def forward(self, timestep: Tensor) -> Tensor:
            return timestep[:, None] * torch.arange(4, device=timestep.device)

    samples = [{"timestep": np.float32([1, 2])}]
    module, _ = to_half(Embedding(), samples, {"timestep": {0: "batch"}}, "fp16")
    assert module(torch.zeros(3)).shape == (3, 4)
    assert module.to("meta")(torch.zeros(3, device="meta")).device.type == "meta"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_follows_from_integers_stays_exact(precision: str) -> None:
    torch.manual_seed(0)
    module = Timestep().eval().requires_grad_(False)
    sample = {"x": np.zeros((3, 2), np.float32), "timestep": np.array([999, 501, 257])}
    narrow, _ = to_half(module, [sample], {}, precision)
    assert np.abs(run(module, sample) - run(narrow, sample)).max() < 0.01
    assert {parameter.dtype for parameter in narrow.parameters()} <= {torch.float16, torch.bfloat16, torch.float32}


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 5e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("layout", ["sd1", "compact"])
def test_a_sound_decoder_needs_no_repair(precision: str, bound: float, layout: str) -> None:
    module = decoder(layout)
    narrow, report = to_half(module, LATENTS, AXES, precision)
    assert report.rescaled == []
    error = max(relative_error(run(module, sample), run(narrow, sample)) for sample in LATENTS)
    assert 1e-5 < error < bound
    wide = [name for name, value in narrow.named_parameters() if value.dtype == torch.float32 and value.ndim > 1]
    wide = [name for name in wide if ".decoder." in name]
    assert wide == []  # every weight is stored narrow


def test_the_scan_takes_the_largest_of_all_samples_and_sees_nan() -> None:
    module = Unrepairable().eval().requires_grad_(False)
    small, large = {"x": np.ones((2, 4), np.float32)}, {"x": np.full((2, 4), 10.0, np.float32)}
    graph = trace(module, small, {})
    both = scan_ranges(graph, [large, small])
    assert both == scan_ranges(graph, [small, large])
    assert both["linear"] == scan_ranges(graph, [large])["linear"] > scan_ranges(graph, [small])["linear"]
    broken: dict[str, Any] = {"x": np.full((2, 4), np.nan, np.float32)}
    assert math.isnan(scan_ranges(graph, [broken, small])["linear"])
