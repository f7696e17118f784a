"""Replaying on a GPU, with what captures there replaced; a GPU's own graphs are measured in docs/distillation.md."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm_deploy.training import graphs
from ldm_deploy.training.graphs import Replayed


@pytest.fixture
def captures(monkeypatch):
    made = []

    def capture(module, inputs):
        made.append(inputs)
        return module

    monkeypatch.setattr(graphs, "capture", capture)
    return made


def test_a_cpu_calls_the_module(captures):
    module = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(Replayed(module)(x), module(x))
    assert captures == []


@pytest.mark.parametrize("enabled", [True, False])
def test_a_gpu_captures_once_and_what_it_captures_is_a_copy(captures, enabled):
    with FakeTensorMode():
        x, module = torch.empty(4, 3, device="cuda"), nn.Linear(3, 2, device="cuda")
        replayed = Replayed(module, enabled=enabled)
        for _ in range(2):
            assert replayed(x).shape == (4, 2)
    assert len(captures) == enabled
    assert all(inputs[0] is not x and inputs[0].shape == x.shape for inputs in captures)


def test_the_module_itself_stays_as_it_is(monkeypatch):
    """torch puts the graph in the place of what it is given, and a graph knows one shape."""
    given = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, *rest, **options: given.append(module))
    module = nn.Linear(3, 2)
    graphs.capture(module, (torch.zeros(1, 3),))
    assert given[0] is not module
    assert torch.equal(given[0](torch.ones(1, 3)), module(torch.ones(1, 3)))
