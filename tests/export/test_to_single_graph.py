"""One call from token ids to pixels: the same image as the host's, in two runtimes, with what is fixed refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ldm_deploy.diffusion.samplers import SamplerRun, step_coefficients
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.errors import ConfigError, EngineError, ParityError, PromptError
from ldm_deploy.export import whole
from ldm_deploy.export.to_single_graph import to_single_graph
from ldm_deploy.export.whole import export_pipeline, largest_difference
from ldm_deploy.models.sources import load_source
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.runtime.bundle import verify_bundle
from ldm_deploy.runtime.pipeline import load
from tests.tiny_bundle import CONTEXT_LENGTH

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def _parts_are_exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For all tests here: tracing them is most of the time."""
    export, made = whole._parts, dict[str, dict[str, Path]]()

    def parts(model: Any, precision: str, folder: Path, seed: int, *rest: Any) -> dict[str, Path]:
        key = json.dumps([model.model, precision, seed])
        if key not in made:
            made[key] = export(model, precision, tmp_path_factory.mktemp("parts"), seed, *rest)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "_parts", parts)
        yield


SCHEDULES = (
    Schedule(),
    Schedule(prediction_type="epsilon", rescale_zero_terminal_snr=False, timestep_spacing="leading"),
    Schedule(prediction_type="sample"),
)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.prediction_type)
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_tables_are_the_sampler(sampler: str, schedule: Schedule, steps: int) -> None:
    rng = np.random.default_rng(0)
    timesteps, table = step_coefficients(sampler, schedule, steps)
    run = SamplerRun(sampler, schedule, steps, noise=lambda index: np.zeros(()))
    x = y = rng.standard_normal(50)
    earlier = np.zeros(50)
    for index, (timestep, _, _) in enumerate(run.levels):
        assert timesteps[index] == timestep
        prediction = rng.standard_normal(50)
        x = run.step(index, x, prediction)
        c = table[index]
        y, earlier = c[0] * y + c[1] * prediction + c[2] * earlier, c[3] * y + c[4] * prediction
        np.testing.assert_allclose(y, x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddpm", "lcm"])
def test_a_sampler_that_draws_noise_is_refused(sampler: str) -> None:
    with pytest.raises(ConfigError, match=f"'{sampler}' draws noise at every step; here it must be ddim, dpmsolver"):
        step_coefficients(sampler, Schedule(), 4)


@pytest.mark.parametrize(("target", "sampler"), [
    ("onnxruntime-cpu", "dpmsolver++"), pytest.param("openvino-cpu", "ddim", marks=pytest.mark.slow),
])  # fmt: skip
def test_it_draws_what_the_host_draws(reference: Path, tmp_path: Path, target: str, sampler: str) -> None:
    bundle = export_pipeline(reference, tmp_path / "out", target=target, sampler=sampler, steps=4, threads=1)
    verify_bundle(bundle.root)
    (engine,) = bundle.data["engines"]
    assert (engine["component"], engine["sampler"], engine["steps"]) == ("pipeline", sampler, 4)
    assert {value["name"]: (value["dtype"], value["shape"]) for value in (*engine["inputs"], *engine["outputs"])} == {
        "input_ids": ("int64", ["batch", CONTEXT_LENGTH]),
        "noise": ("float32", ["batch", 4, "H/4", "W/4"]),
        "guidance_scale": ("float32", []),
        "image": ("uint8", ["batch", "H", "W", 3]),
    }
    pipeline, host = load(bundle.root, threads=1), torch_pipeline(load_source(reference), threads=1)
    for guidance_scale, size in ((1.0, (32, 32)), (4.0, (32, 48))):
        options: dict[str, Any] = {"seed": [5, 6, 7], "guidance_scale": guidance_scale, "size": size}
        drawn = pipeline(["sun", "", "cat face"], **options)
        expected = host(["sun", "", "cat face"], steps=4, sampler=sampler, **options)
        assert drawn.shape == (3, *size, 3)
        assert len(np.unique(drawn)) > 20
        assert largest_difference(drawn, expected) <= 1


@pytest.fixture(scope="module")
def exported(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pipeline") / "out"
    return export_pipeline(reference, out, steps=3, threads=1).root


def test_what_is_fixed_is_refused(exported: Path) -> None:
    pipeline = load(exported, threads=1)
    assert pipeline("sun", steps=3, sampler="ddim").shape == (1, 32, 32, 3)
    for request, message in (
        ({"steps": 4}, "steps is 4; in this variant's engine it is fixed: 3"),
        ({"sampler": "euler"}, "sampler is 'euler'; in this variant's engine it is fixed: 'ddim'"),
        ({"negative_prompt": "moon"}, "negative_prompt is not to be had from an engine that holds"),
        ({"on_step": print}, "on_step is not to be had"),
        ({"size": (33, 32)}, "height is 33; it must be a multiple"),
    ):
        options: dict[str, Any] = request
        with pytest.raises(PromptError, match=message):
            pipeline("sun", **options)
    with pytest.raises(EngineError, match="no engine for vae_encoder; it has: pipeline"):
        pipeline.encode(np.zeros((32, 32, 3), np.uint8))


def test_weights_are_stored_once(exported: Path, reference: Path) -> None:
    model = onnx.load(str(exported / "engines" / "pipeline-fp32.onnx"))
    (loop,) = [node for node in model.graph.node if node.op_type == "Loop"]
    assert [entry.g.initializer for entry in loop.attribute if entry.name == "body"] == [[]]
    stored = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    modules = load_source(reference).components()
    owners = (modules["text_encoder"], modules["unet"], modules["vae_decoder"].autoencoder.decoder)  # type: ignore[union-attr]
    assert stored < 1.05 * sum(value.numel() for owner in owners for value in owner.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrong",
    [*(pytest.param(wrong, marks=pytest.mark.slow) for wrong in ("empty_ids", "scale_factor")), "steps"],
)
def test_a_graph_that_draws_something_else_is_not_accepted(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def build(parts: Any, path: Path, **options: Any) -> None:
        if wrong == "empty_ids":
            options["empty_ids"] = [3] * len(options["empty_ids"])
        elif wrong == "steps":
            options["steps"] += 1
        else:
            options["model"] = {**options["model"], "scale_factor": 1.02 * options["model"]["scale_factor"]}
        to_single_graph(parts, path, **options)

    monkeypatch.setattr(whole, "to_single_graph", build)
    with pytest.raises(ParityError, match=r"pipeline: engine pipeline-fp32-onnxruntime-cpu differs from the"):
        export_pipeline(reference, tmp_path / "out", steps=3, threads=1)
    assert list(tmp_path.iterdir()) == []
