"""A U-Net with parts removed: what is left computes what it did."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from ldm_deploy.config import PRESETS, UNetConfig
from ldm_deploy.errors import ArtifactError
from ldm_deploy.eval.parity import Probe, check_parity
from ldm_deploy.export.to_onnx import component_axes, export_module
from ldm_deploy.models.components import SIGNATURES
from ldm_deploy.models.interchange import save_unet
from ldm_deploy.models.unet import INNERMOST, UNet
from ldm_deploy.runtime.engines import OnnxRuntimeEngine

TINY = {**dataclasses.asdict(PRESETS["tiny"].unet), "in_channels": 4, "context_channels": 8}
DEEP = {**TINY, **dataclasses.asdict(UNetConfig((16, 32, 48), 2, (1, 2), (1, 2, 3), 8, "sd1"))}


def build(described, **options):
    torch.manual_seed(0)
    unet = UNet(**described, **options).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(height=8, width=8, batch=2):
    numbers = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, height, width, generator=numbers)
    return sample, torch.arange(batch) + 5, torch.randn(batch, 3, 8, generator=numbers)


@pytest.mark.parametrize("described", [TINY, DEEP])
def test_with_everything_kept_it_is_the_same_to_the_bit(described):
    whole, kept = build(described), UNet(**described, removed=()).eval().requires_grad_(False)
    kept.load_state_dict(whole.state_dict())
    assert torch.equal(whole(*inputs()), kept(*inputs()))


@pytest.mark.parametrize("described", [TINY, DEEP])
def test_each_part_can_go_alone_and_a_fresh_one_takes_the_weights_that_are_left(described):
    whole = build(described)
    before = whole(*inputs())
    for name in whole.removable():
        pruned = copy.deepcopy(whole)
        pruned.remove(name)
        fresh = UNet(**described, removed=[name]).eval().requires_grad_(False)
        fresh.load_state_dict(pruned.state_dict())
        found = pruned(*inputs())
        assert found.shape == before.shape
        assert torch.equal(found, fresh(*inputs())), name
        assert not torch.allclose(found, before), name
        assert name not in pruned.removable()
        own, theirs = pruned.state_dict(), whole.state_dict()
        assert len(own) < len(theirs)
        assert set(own) < set(theirs)


def test_all_parts_together_in_any_order():
    whole = build(DEEP)
    names = whole.removable()
    ones = [copy.deepcopy(whole), copy.deepcopy(whole)]
    for pruned, order in zip(ones, (names, names[::-1]), strict=True):
        for name in order:
            if name in pruned.removable():
                pruned.remove(name)
        assert pruned.removable() == []
        assert pruned(*inputs(4, 12)).shape == (2, 4, 4, 12)
    assert set(ones[0].removed) == set(ones[1].removed)
    assert torch.equal(ones[0](*inputs()), ones[1](*inputs()))


@pytest.mark.parametrize("name", ["down.0.block", "down.2.transformer", "middle.0.block", "up.1.transformer"])
def test_a_part_whose_output_is_zero_changes_nothing_when_it_goes(name):
    whole = build(TINY)
    part = name.rpartition(".")[2]
    branch = whole.get_submodule(name)
    for parameter in (branch.conv2 if part == "block" else branch.proj_out).parameters():
        nn.init.zeros_(parameter)
    pruned = copy.deepcopy(whole)
    pruned.remove(name)
    assert torch.equal(pruned(*inputs()), whole(*inputs()))


def test_what_is_left_stays_on_its_device():
    unet = build(TINY).to("meta")
    unet.remove(INNERMOST)
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}


def test_without_the_innermost_level_the_stage_above_reads_its_skip_connection_with_its_own_weights():
    whole = build(DEEP)
    pruned = copy.deepcopy(whole)
    pruned.remove(INNERMOST)
    above = pruned.up[4]
    assert above.block.conv1.in_channels == 32
    assert torch.equal(above.block.conv1.weight, whole.up[4].block.conv1.weight[:, -32:])
    assert torch.equal(above.block.shortcut.weight, whole.up[4].block.shortcut.weight[:, -32:])
    assert torch.equal(above.block.norm1.weight, whole.up[4].block.norm1.weight[-32:])
    assert len(pruned.down) == 2 + 1 + 2
    assert len(pruned.middle) == 0


def test_a_part_that_is_not_there_is_named():
    unet = build(TINY)
    unet.remove(INNERMOST)
    with pytest.raises(ValueError, match=r"no part 'middle.0.block' to remove; there are: down.0.block"):
        unet.remove("middle.0.block")
    with pytest.raises(ValueError, match="no part 'innermost' to remove"):
        UNet(**{**TINY, "channels": (16,), "num_heads": (1,), "attention_levels": ()}, removed=[INNERMOST])


def test_a_pruned_one_takes_the_guidance_as_well():
    unet = build(TINY, guidance_embedding=True)
    unet.remove("middle.0.block")
    weak, strong = (unet(*inputs(), torch.full((2,), value)) for value in (1.0, 8.0))
    assert not torch.allclose(weak, strong)


def test_the_engine_computes_what_torch_does(tmp_path):
    unet = build({**TINY, "removed": [INNERMOST, "down.0.block"]})
    path = tmp_path / "unet-fp32.onnx"
    names = SIGNATURES["unet"][0]
    example = {name: value.numpy() for name, value in zip(names, inputs(), strict=True)}
    export_module(unet, example, *component_axes("unet", 4, SIGNATURES["unet"]), path, component="unet")
    probes = []
    for sizes in ((4, 6, 1), (2, 10, 3)):
        given = inputs(*sizes)
        feeds = {name: np.ascontiguousarray(value.numpy()) for name, value in zip(names, given, strict=True)}
        probes.append(Probe(feeds, {"prediction": unet(*given).numpy()}))
    found = check_parity(OnnxRuntimeEngine(path, threads=1), probes, 1e-4, component="unet", name=path.stem)
    assert found.relative_error < 1e-5


def test_diffusers_layout_has_no_place_for_it(tmp_path):
    unet = build({**DEEP, "removed": ["middle.0.block"]})
    with pytest.raises(ArtifactError, match="no place for a pruned U-Net"):
        save_unet(unet, tmp_path, 8)
