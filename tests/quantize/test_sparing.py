"""The nodes that quantization hurts are found and stay in float, and no others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ldm_deploy.eval.budget import Limits
from ldm_deploy.eval.parity import Probe, compare_outputs
from ldm_deploy.onnx_graph import load_model
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.candidates import Candidate, _best, build_candidates
from ldm_deploy.quantize.kit import LayerInfo
from ldm_deploy.quantize.onnxruntime_cpu import RECIPES, OnnxRuntimeKit
from ldm_deploy.quantize.qdq import select_nodes
from ldm_deploy.quantize.scheme import Recipe
from ldm_deploy.quantize.sizes import size_limit
from ldm_deploy.quantize.sparing import fewest, hopeless, ranking, spare
from ldm_deploy.runtime.engines import OnnxRuntimeEngine

WIDTH = 32


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Twelve MatMuls side by side, added up. What node 7 reads has one channel a thousand times as large as the others,
    which its weights do not look at: one scale for all channels leaves the others nothing."""
    draw = np.random.default_rng(0)
    nodes, constants, total = [], [], "x"
    outlier = np.ones(WIDTH, np.float32)
    outlier[0] = 1000
    constants.append(numpy_helper.from_array(outlier, "outlier"))
    nodes.append(helper.make_node("Mul", ["x", "outlier"], ["stretched"], name="stretch"))
    for index in range(12):
        weight = draw.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 8
        if index == 7:
            weight[0] = 0
        constants.append(numpy_helper.from_array(weight, f"w{index}"))
        source = "stretched" if index == 7 else "x"
        nodes.append(helper.make_node("MatMul", [source, f"w{index}"], [f"y{index}"], name=f"product{index}"))
        nodes.append(helper.make_node("Add", [total, f"y{index}"], [f"sum{index}"], name=f"add{index}"))
        total = f"sum{index}"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", total)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", value[:1], value[1:], constants),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=10,
    )  # fmt: skip
    path = tmp_path / "graph.onnx"
    onnx.save(model, str(path))
    return path


def run(graph: Path, tmp_path: Path, limit: float):
    draw = np.random.default_rng(1)
    feeds = [{"x": draw.standard_normal((4, WIDTH)).astype(np.float32)} for _ in range(4)]
    engine = OnnxRuntimeEngine(graph, threads=1)
    probes = [Probe(one, engine.run(one)) for one in feeds]
    kit = OnnxRuntimeKit(graph, recipes={"matmul": RECIPES["matmul"]}, threads=1)
    samples = Samples({"x": np.stack([one["x"][0] for one in feeds])})
    kit.calibrate(Samples({"x": np.concatenate([one["x"] for one in feeds])}), samples, tmp_path)
    return spare(kit, tmp_path / "out.onnx", RECIPES["matmul"], probes, limit)


def test_the_planted_node_is_spared_and_no_other(graph: Path, tmp_path: Path) -> None:
    assert len(select_nodes(load_model(graph), RECIPES["matmul"])) == 12
    found = run(graph, tmp_path, 0.05)
    assert found is not None
    recipe, parity = found
    assert recipe.keep_float == ("product7",)
    assert parity.passed
    assert parity.limit == 0.05
    weights = {tensor.name: tensor.data_type for tensor in load_model(tmp_path / "out.onnx").graph.initializer}
    assert weights["w7"] == TensorProto.FLOAT
    assert sum(name.endswith("_quantized") and kind == TensorProto.INT8 for name, kind in weights.items()) == 11


def test_a_limit_that_cannot_be_kept_leaves_no_file(graph: Path, tmp_path: Path) -> None:
    assert run(graph, tmp_path, 1e-6) is None
    assert not (tmp_path / "out.onnx").exists()


def test_too_few_layers_to_spare_one_and_nothing_built(tmp_path: Path) -> None:
    """Their errors are known from the recipe before, and a quarter of three layers is none."""

    class Kit:
        def layers(self, recipe: object) -> list[LayerInfo]:
            return [LayerInfo(name, "Conv") for name in "abc"]

        def files(self, path: Path) -> list[Path]:
            return [path, path.with_suffix(".bin")]

    known = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert spare(Kit(), tmp_path / "out.xml", RECIPES["conv"], [], 0.1, known) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("known", [{}, {"n7": 0.9, "n60": 0.01}])
def test_the_worst_of_many_are_found_with_few_measurements(known: dict[str, float]) -> None:
    """Errors that add up in squares, as those of nodes that are not correlated do."""
    errors = {f"n{index}": 0.01 for index in range(118)} | {"n7": 0.9, "n8": 0.3, "n100": 0.5}
    asked: list[int] = []

    def error(group: Sequence[str]) -> float:
        asked.append(len(group))
        return math.sqrt(sum(errors[name] ** 2 for name in group))

    found = list(itertools.islice(ranking(list(errors), error, dict(known)), 3))
    assert [name for name, _ in found] == ["n7", "n100", "n8"]
    assert found[-1][1] == pytest.approx(0.01 * math.sqrt(115), rel=1e-6)
    assert len(asked) <= 30


@pytest.mark.parametrize("bad", [0, 20])
def test_where_too_many_err_it_is_given_up_early(bad: int) -> None:
    """Of 132 nodes 33 may be spared. 99 that err alike leave too much, and that is known before each is measured."""
    errors = {f"n{index}": 0.5 if index < bad else 0.02 for index in range(132)}
    asked: list[int] = []

    def error(group: Sequence[str]) -> float:
        asked.append(len(group))
        return math.sqrt(sum(errors[name] ** 2 for name in group))

    list(itertools.islice(ranking(list(errors), error, {}), 33))
    without = len(asked)
    asked.clear()
    limit = 0.06  # 99 nodes at 0.02 have 0.199
    found = list(ranking(list(errors), error, {}, lambda *left: hopeless(*left, most=33, limit=limit)))
    assert len(found) < 33
    assert len(asked) < 0.75 * without
    asked.clear()
    within = list(ranking(list(errors), error, {}, lambda *left: hopeless(*left, most=33, limit=0.2)))
    assert len(within) >= 33, "what can be kept is not given up"


def test_a_group_whose_error_is_not_finite_is_looked_at_whole() -> None:
    def error(group: Sequence[str]) -> float:
        return math.inf if "b" in group else 0.1 * len(group)

    assert [name for name, _ in ranking("abcd", error, {})] in (["b", *rest] for rest in itertools.permutations("acd"))


def test_where_errors_do_not_add_up_more_are_spared_until_it_is_enough(tmp_path: Path) -> None:
    """Two nodes whose errors cancel: together they look harmless, and what is left is worse than predicted."""
    built: list[tuple[str, ...]] = []

    class Kit:
        def layers(self, recipe: object) -> list[LayerInfo]:
            return [LayerInfo(f"n{index}", "Conv") for index in range(16)]

        def build(self, path: Path, recipe: Any) -> None:
            built.append(recipe.keep_float)

        def open(self, path: Path, recipe: Any, *, trial: bool = False) -> Any:
            inside = {f"n{index}" for index in range(16)} - set(recipe.keep_float)
            value = 1 + 0.3 * ("n3" in inside) + 0.2 * ("n4" in inside) + 0.001 * len(inside)
            return SimpleNamespace(run=lambda feeds: {"y": np.full((1, 1), value)})

        def files(self, path: Path) -> list[Path]:
            return [path]

    found = spare(Kit(), tmp_path / "out", RECIPES["conv"], [Probe({}, {"y": np.ones((1, 1))})], 0.05)  # type: ignore[arg-type]
    assert found is not None
    assert set(found[0].keep_float) == {"n3", "n4"}
    assert built[-1] == found[0].keep_float


@pytest.mark.parametrize("least", [1, 2, 5, 9, 10])
def test_fewest_finds_the_smallest_count(least: int) -> None:
    asked: list[int] = []

    def enough(count: int) -> bool:
        asked.append(count)
        return count >= least

    assert fewest(10, enough) == least
    assert len(asked) <= 5
    assert fewest(10, lambda count: False) is None
    assert fewest(0, lambda count: True) is None


def test_of_equally_fast_engines_the_smaller_is_kept(tmp_path: Path) -> None:
    def candidate(name: str, size: int, median: float, high: float) -> Candidate:
        path = tmp_path / name
        path.write_bytes(b"0" * size)
        speedup = {"median": median, "ci95_low": 1.0, "ci95_high": high}
        return Candidate(name, path, RECIPES["conv"], parity=None, found={}, speedup=speedup, size_bytes=size)  # type: ignore[arg-type]

    large, small, slow = (
        candidate("large", 9, 1.4, 1.5),
        candidate("small", 5, 1.3, 1.41),
        candidate("slow", 1, 1.1, 1.39),
    )
    assert _best([large, small, slow]) is small
    assert _best([large, slow]) is large
    assert _best([]) is None


def test_what_breaks_the_size_limit_is_kept_only_if_all_do():
    def made(name: str, speed: float, size: int) -> Candidate:
        speedup = {"median": speed, "ci95_low": speed, "ci95_high": speed}
        return Candidate(name, Path(name), RECIPES["conv"], parity=None, found={}, speedup=speedup, size_bytes=size)  # type: ignore[arg-type]

    fast, small = made("fast", 2.0, 900), made("small", 1.5, 300)
    assert _best([fast, small]) is fast
    assert _best([fast, small], 500) is small
    assert _best([fast, small], 100) is fast


@pytest.mark.parametrize(("size_max", "decoder", "unet"), [("0.6x", 104, 470), (650, 90, 400), (None, None, None)])
def test_the_largest_component_may_have_what_the_others_saved(size_max, decoder, unet):
    limits = Limits({} if size_max is None else {"size_max": size_max}, ())
    sizes = {"text_encoder": 100, "unet": 800, "vae_decoder": 200, "vae_encoder": 100}
    first = size_limit(limits, sizes, 1200, ["vae_decoder", "unet"])
    assert first == (math.inf if decoder is None else pytest.approx(decoder))
    last = size_limit(limits, {**sizes, "vae_decoder": 50}, 1200, ["unet"])
    assert last == (math.inf if unet is None else pytest.approx(unet))


def test_outputs_are_rounded_by_channel_before_layers_are_spared(
    denoiser: Path, samples: list[dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """Where one scale errs too much; and if both do, it is the finer one that layers are spared of."""
    engine = OnnxRuntimeEngine(denoiser, threads=1)
    probes = [Probe(feeds, engine.run(feeds)) for feeds in samples]
    kit = OnnxRuntimeKit(denoiser, recipes={"conv+matmul": Recipe()}, threads=1)
    arrays = {name: np.concatenate([feeds[name] for feeds in samples]) for name in samples[0]}
    kit.calibrate(Samples(arrays), Samples(arrays), tmp_path)
    errors = {}
    for by_channel in (False, True):
        kit.build(tmp_path / "trial.onnx", replace(kit.settle(Recipe()), by_channel=by_channel))
        errors[by_channel] = compare_outputs(OnnxRuntimeEngine(tmp_path / "trial.onnx"), probes, 1.0).relative_error
    assert errors[True] < errors[False]
    for limit, by_channel, spared in (
        (1.01 * errors[False], False, False),
        ((errors[True] + errors[False]) / 2, True, False),
        (0.9 * errors[True], True, True),
    ):
        (candidate,) = build_candidates("unet", kit, tmp_path / "made", probes, limit, {})
        assert isinstance(candidate.recipe, Recipe)
        assert candidate.recipe.by_channel == by_channel
        assert bool(candidate.recipe.keep_float) == spared
        assert candidate.parity.passed
