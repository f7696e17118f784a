from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ldm_deploy.eval import memory
from ldm_deploy.eval.machine import conditions, machine
from ldm_deploy.eval.memory import MemoryLog, fp32_size_bytes, peak_memory_bytes, size_bytes


def test_peak_memory_holds_what_was_touched() -> None:
    before = peak_memory_bytes()
    block = np.ones(64 * 2**20, np.uint8)
    after = peak_memory_bytes()
    del block
    assert after >= before
    assert after > 64 * 2**20
    assert peak_memory_bytes() > after - 2**20  # a peak does not go down; the kernel counts in coarse steps


def test_weights_stored_as_halves_count_as_fp32(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((3, 5), np.float16), "b": np.zeros((), np.float32)}, str(tmp_path / "unet.safetensors"))
    save_file({"c": np.zeros(7, np.float16)}, str(tmp_path / "autoencoder.safetensors"))
    assert fp32_size_bytes(tmp_path.glob("*.safetensors")) == 4 * (15 + 1 + 7)


def test_a_file_named_twice_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert size_bytes([tmp_path / "a", tmp_path / "a"]) == 5


def test_the_fingerprint_is_of_the_hardware_and_not_of_threads_or_load() -> None:
    one, other = machine(1), machine(2)
    assert one["fingerprint"] == other["fingerprint"]
    assert (one["threads"], other["threads"]) == (1, 2)
    assert one["cpu"]
    assert one["versions"]["numpy"] == np.__version__


def test_the_conditions_are_those_of_the_kernel() -> None:
    found = conditions()
    if not Path("/proc/stat").is_file():
        assert found["stolen_s"] is None
        return
    assert len(found["load_average"]) == 3
    assert found["stolen_s"] >= 0
    assert conditions()["stolen_s"] >= found["stolen_s"]
    if found["frequency_mhz"] is not None:
        assert all(100 < frequency < 10_000 for frequency in found["frequency_mhz"])


def test_frequencies_come_from_cpufreq_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, kilohertz in ((0, 1_200_000), (1, 3_400_500)):
        (tmp_path / f"cpu{number}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{number}" / "cpufreq" / "scaling_cur_freq").write_text(f"{kilohertz}\n")
    monkeypatch.setattr("ldm_deploy.eval.machine.CPUS", tmp_path)
    assert conditions()["frequency_mhz"] == [1200.0, 3400.5]


class Gpu:
    def __init__(self, allocated: int) -> None:
        self.allocated = allocated

    def is_available(self) -> bool:
        return True

    def max_memory_allocated(self) -> int:
        return self.allocated


def test_a_gpus_peak_is_the_allocators_the_drivers_or_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([1000, 1700])
    monkeypatch.setattr(memory, "_gpu_used_bytes", lambda: next(used))
    log = MemoryLog(gpu=True)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=Gpu(0)))  # it is there, and this engine is not its
    found = log.report("cuda")
    assert (found["gpu_peak_bytes"], found["gpu_reason"]) == (700, None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=Gpu(4096)))
    assert log.report("cuda")["gpu_peak_bytes"] == 4096
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(memory, "_gpu_used_bytes", lambda: None)
    found = log.report("cuda")
    assert found["gpu_peak_bytes"] is None
    assert "cuda-python is not installed; pip install 'ldm-deploy[tensorrt]'" in found["gpu_reason"]


def test_where_a_peak_cannot_be_started_anew_it_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog()

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    log.loaded()
    found = log.report("cpu")
    assert (found["peak_working_bytes"], found["activations_bytes"]) == (None, None)
    assert found["reason"] == "this system does not tell the peak of a part of a process's life"
    assert found["peak_bytes"] >= peak_memory_bytes()
