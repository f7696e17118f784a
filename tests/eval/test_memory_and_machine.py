from __future__ import annotations

from pathlib import Path

import numpy as np

from ldm_deploy.eval.machine import machine
from ldm_deploy.eval.memory import fp32_size_bytes, peak_memory_bytes, size_bytes


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
