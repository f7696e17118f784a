"""Which clock times what, and in what order a GPU's events are used; tried on a stand-in for torch.cuda."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm_deploy.eval.clock import clock_of, cuda_clock, device_of, host_clock


class Gpu:
    """torch.cuda as far as it is used; `log` is what happened in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def is_available(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def Event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        name = "end" if hasattr(self, "made") else "start"
        self.made = True
        return SimpleNamespace(
            record=lambda: self.log.append(f"record {name}"),
            synchronize=lambda: self.log.append(f"wait for {name}"),
            elapsed_time=lambda end: 12.5 if name == "start" else -12.5,
        )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    stand_in = Gpu()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=stand_in))
    return stand_in


def test_the_host_clock_returns_what_was_called() -> None:
    milliseconds, result = host_clock(lambda: sum(range(1000)))
    assert result == 499500
    assert milliseconds > 0


def test_events_enclose_the_call_and_nothing_queued_before(gpu: Gpu) -> None:
    milliseconds, result = cuda_clock(lambda: gpu.log.append("call") or "result")
    assert (milliseconds, result) == (12.5, "result")
    assert gpu.log == ["synchronize", "record start", "call", "record end", "wait for end"]


def test_events_are_for_torch_on_a_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu, on_cpu = SimpleNamespace(device="cuda:0"), SimpleNamespace(device="cpu")
    assert clock_of(on_gpu) == ("cuda events", cuda_clock)
    assert clock_of(on_cpu) == ("host", host_clock)
    monkeypatch.delitem(sys.modules, "torch")  # ONNX Runtime or TensorRT without torch: arrays of the host come back
    assert clock_of(on_gpu) == ("host", host_clock)


def test_where_an_engine_runs() -> None:
    assert device_of(SimpleNamespace(module=torch.nn.Linear(1, 1))) == "cpu"
    assert device_of(SimpleNamespace(module=torch.nn.Linear(1, 1, device="meta"))) == "meta"
    assert device_of(SimpleNamespace(device="cuda:1")) == "cuda"
    assert device_of(object()) == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_events_agree_with_the_host_where_the_result_is_fetched() -> None:
    matrix = torch.ones(4096, 4096, device="cuda")

    def call() -> Any:
        product = matrix
        for _ in range(20):
            product = product @ matrix / 4096
        return product.cpu()

    call()
    measured, _ = cuda_clock(call)
    expected, _ = host_clock(call)
    assert measured == pytest.approx(expected, rel=0.3)
