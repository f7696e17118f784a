"""Layers drawn for on a cluster: the same figures as at home, and what a node may not answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_deploy.errors import ConfigError
from ldm_deploy.eval import cluster
from ldm_deploy.eval.parity import Probe
from ldm_deploy.quantize import cpu, far
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.drawing import Drawing, Studio
from ldm_deploy.quantize.far import Far
from ldm_deploy.quantize.onnxruntime_cpu import OnnxRuntimeKit
from ldm_deploy.quantize.sensitivity import LayerStudy, study_layers
from ldm_deploy.runtime.bundle import write_bundle
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from tests.quantize.conftest import make_feeds
from tests.tiny_bundle import write_tiny_bundle

Study = Callable[..., list[LayerStudy]]


@pytest.fixture
def study(denoiser: Path, tmp_path: Path) -> Study:
    """A study of the tiny U-Net; `address` of a cluster, or None."""
    bundle = write_tiny_bundle(tmp_path / "bundle")
    (bundle / "engines" / "unet-fp32.onnx").write_bytes(denoiser.read_bytes())
    write_bundle(bundle, json.loads((bundle / "bundle.json").read_text()))
    kit = OnnxRuntimeKit(denoiser, threads=1)
    feeds = [make_feeds(seed) for seed in range(4)]
    samples = Samples({name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]})
    kit.calibrate(samples, samples, tmp_path / "kit")
    studio = Studio(bundle, "fp32-onnxruntime-cpu", ("sun", "rocket"), (0, 1), 3, 1)
    probes = [Probe(feeds[0], OnnxRuntimeEngine(kit.model_path, threads=1).run(feeds[0]))]

    def run(address: str | None, journal: Path | None = None) -> list[LayerStudy]:
        there = None if address is None else Far(address, studio)
        layers, _ = study_layers(
            "unet", kit, kit.settle(kit.recipes["conv+matmul"]), feeds[0], tmp_path / "trials", probes=probes,
            drawing=studio.open(), far=there, journal=journal,
        )  # fmt: skip
        assert list((tmp_path / "trials").glob("far*")) == []
        return layers

    return run


def quality(layers: list[LayerStudy]) -> dict[str, Any]:
    return {layer.name: (layer.image_psnr_db, layer.relative_error) for layer in layers}


@pytest.fixture
def nearby(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A cluster of this process, which finishes in reverse; grows by every job."""
    jobs: list[Any] = []

    def spread(function: Any, arguments: Any, address: str, **options: Any) -> Iterator[Any]:
        assert (address, options["threads"]) == ("there", 1)
        given = list(arguments)
        jobs.extend(given)
        return ((one, function(one)) for one in reversed(given))

    monkeypatch.setattr(cluster, "spread", spread)
    return jobs


def test_what_is_drawn_far_is_not_drawn_here_and_is_the_same(
    study: Study, nearby: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = study(None)
    drawn: list[Any] = []
    original = Drawing.images
    monkeypatch.setattr(Drawing, "images", lambda self, *rest: drawn.append(self) or original(self, *rest))
    journal = tmp_path / "layers.jsonl"
    assert quality(study("there", journal)) == quality(here)
    assert [job.name for job in nearby] == [layer.name for layer in here]
    assert len({id(one) for one in drawn}) == 2  # the node's; here, what all are compared with
    assert len(drawn) == len(here) + 1
    assert quality(study("there", journal)) == quality(here)  # all is in the journal
    assert len(nearby) == len(here)


def test_a_study_killed_after_the_drawing_does_not_draw_again(
    study: Study, nearby: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    journal = tmp_path / "layers.jsonl"

    def killed(*rest: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeKit, "node_times", killed)
        with pytest.raises(KeyboardInterrupt):
            study("there", journal)
    count = len(nearby)
    found = study("there", journal)
    assert len(nearby) == count == len(found)
    assert quality(found) == quality(study(None))


def test_a_node_that_multiplies_otherwise_draws_nothing(
    study: Study, nearby: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node without VNNI for a machine with it."""
    expected = quality(study(None))
    answers = iter([True, False] * 100)  # asked when a job is made, and when it is drawn
    monkeypatch.setattr(cpu, "has_vnni", lambda: next(answers))
    monkeypatch.setattr(far, "_opened", lambda studio: pytest.fail("drawn where 8 bits are multiplied otherwise"))
    assert quality(study("there")) == expected


def test_without_a_search_there_is_nothing_to_draw_for() -> None:
    from ldm_deploy.commands import check_ray

    check_ray("auto", 1)
    check_ray(None, 0)
    with pytest.raises(ConfigError, match=r"--ray auto draws for the search, and nothing is searched; add --builds N"):
        check_ray("auto", 0)


@pytest.mark.slow
def test_two_workers_of_a_ray_cluster_find_what_one_process_does(study: Study) -> None:
    pytest.importorskip("ray")
    assert quality(study("local")) == quality(study(None))
