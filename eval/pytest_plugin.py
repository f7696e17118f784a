"""pytest plugin: `pytest --ldm-bundle DIR [--ldm-budget B.toml] [--ldm-against REPORT.json]` has one test per gate.

The tests are called `variant::gate`. One that broke its limit fails with the gate's reason; one that was not measured
fails if the budget requires it, and is skipped with the reason otherwise. The bundle is evaluated once, by the first of
them. Fixtures for tests of one's own: `ldm_bundle`, `ldm_pipeline`, `ldm_compare`. Without the options nothing is
collected and nothing but this file is imported.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import numpy as np

    from ldm_deploy.eval.regression import Stored
    from ldm_deploy.runtime.pipeline import Pipeline

OPTIONS = {
    "--ldm-bundle": ("DIR", "evaluate this bundle and add a test per variant and gate"),
    "--ldm-budget": ("B.toml", "limits (the shipped ones)"),
    "--ldm-against": ("REPORT.json", "an earlier result, which no variant may be worse than"),
    "--ldm-reference": ("DIR", "the fp32 model that the bundle was made from (the shipped one)"),
}
RUNS = "runs"
PLAN = pytest.StashKey[dict[str, list[str]]]()
SHARED = pytest.StashKey[str]()  # on xdist's controller: a folder that its workers meet in
RESULT = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ldm-deploy", "gates of a bundle of engines")
    for name, (metavar, text) in OPTIONS.items():
        group.addoption(name, metavar=metavar, type=Path, default=None, help=text)


def pytest_configure(config: pytest.Config) -> None:
    given = [name for name in OPTIONS if _option(config, name) is not None]
    if not given:
        return
    if "--ldm-bundle" not in given:
        raise pytest.UsageError(f"{given[0]} says how to judge a bundle; give one with --ldm-bundle DIR")
    from ldm_deploy.errors import LdmDeployError

    try:
        config.stash[PLAN] = _planned(config)
    except LdmDeployError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist's controller, before it starts a worker: only one of them is to evaluate."""
    if SHARED not in node.config.stash:
        node.config.stash[SHARED] = tempfile.mkdtemp(prefix="ldm-deploy-pytest-")
    node.workerinput["ldm_deploy_shared"] = node.config.stash[SHARED]


def pytest_unconfigure(config: pytest.Config) -> None:
    if SHARED in config.stash:
        shutil.rmtree(config.stash[SHARED], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """The variants come after the files and folders of the session."""
    report = yield
    if isinstance(collector, pytest.Session) and report.passed:
        for variant in collector.config.stash.get(PLAN, {}):
            report.result.append(VariantNode.from_parent(collector, name=variant, nodeid=variant))
    return report


class VariantNode(pytest.Collector):
    """The gates of one variant."""

    def collect(self) -> Iterator[pytest.Item]:
        for gate in self.config.stash[PLAN][self.name]:
            yield GateItem.from_parent(self, name=gate, variant=self.name)


class GateItem(pytest.Item):
    """One gate of one variant."""

    def __init__(self, *, variant: str, **rest: Any) -> None:
        super().__init__(**rest)
        self.variant = variant

    def setup(self) -> None:
        self.row = next(row for row in evaluated(self.config)["variants"] if row["name"] == self.variant)

    def runtest(self) -> None:
        if self.name == RUNS:
            if self.row["status"] != "ok":
                pytest.fail(f"{self.variant}: {self.row['reason']}", pytrace=False)
            return
        gate = next((gate for gate in self.row["gates"] if gate["name"] == self.name), None)
        if gate is None:
            pytest.skip(f"{self.variant} was not judged; refused: {self.row['refused']}")
        text = f"{self.variant}: {gate['name']} {gate['limit_text']}: {gate['reason']}"
        if gate["result"] == "fail":
            pytest.fail(text, pytrace=False)
        if gate["result"] == "not measured":
            if gate["required"]:
                pytest.fail(f"not measured and required: {text}", pytrace=False)
            pytest.skip(f"not measured: {text}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        from ldm_deploy.errors import LdmDeployError

        if isinstance(excinfo.value, LdmDeployError):
            return str(excinfo.value)  # it says what to do; where it was raised helps nobody
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.nodeid


def evaluated(config: pytest.Config) -> dict[str, Any]:
    """The content of report.json, from the first call of this session, of all its processes together."""
    if RESULT not in config.stash:
        try:
            config.stash[RESULT] = _shared_evaluation(config)
        except Exception as error:
            config.stash[RESULT] = error
    if isinstance(config.stash[RESULT], Exception):
        raise config.stash[RESULT]
    found: dict[str, Any] = config.stash[RESULT]
    return found


def _shared_evaluation(config: pytest.Config) -> dict[str, Any]:
    folder = getattr(config, "workerinput", {}).get("ldm_deploy_shared")
    if folder is None:
        return _evaluation(config)
    import fcntl

    from ldm_deploy.artifact import atomic_write_json

    file = Path(folder, "report.json")
    with Path(folder, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            atomic_write_json(file, _evaluation(config))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _evaluation(config: pytest.Config) -> dict[str, Any]:
    from ldm_deploy.eval.budget import load_budget
    from ldm_deploy.eval.compare import evaluate_bundle

    return evaluate_bundle(
        _option(config, "--ldm-bundle"),
        reference=_option(config, "--ldm-reference"),
        budget=load_budget(_option(config, "--ldm-budget")),
        against=_stored(config),
    )


def _planned(config: pytest.Config) -> dict[str, list[str]]:
    """variant -> its gates, as an evaluation will have them, from the files alone."""
    from ldm_deploy.eval.budget import AGAINST, load_budget
    from ldm_deploy.runtime.bundle import read_bundle

    budget = load_budget(_option(config, "--ldm-budget"))
    bundle = read_bundle(_option(config, "--ldm-bundle"))
    stored = _stored(config)
    drawn = {} if stored is None else stored.drawn
    plan = {variant: [RUNS, *budget.limits_for(variant).limits] for variant in bundle.variants}
    for variant in drawn:
        tolerances = budget.tolerances_for(variant).limits if variant in plan else ()
        plan[variant] = [*plan.get(variant, ()), AGAINST[0], *tolerances]
    return plan


def _stored(config: pytest.Config) -> Stored | None:
    from ldm_deploy.eval.regression import read_stored

    path = _option(config, "--ldm-against")
    return None if path is None else read_stored(path)


def _option(config: pytest.Config, name: str) -> Any:
    return config.getoption(name.removeprefix("--").replace("-", "_"))


@pytest.fixture(scope="session")
def ldm_bundle(pytestconfig: pytest.Config) -> Path:
    """The directory given with --ldm-bundle."""
    path: Path | None = _option(pytestconfig, "--ldm-bundle")
    if path is None:
        pytest.skip("no bundle to test; run pytest with --ldm-bundle DIR")
    return path


@pytest.fixture(scope="session")
def ldm_pipeline(ldm_bundle: Path) -> Pipeline:
    """The bundle's default variant, ready to draw."""
    import ldm_deploy

    return ldm_deploy.load(ldm_bundle)


@pytest.fixture(scope="session")
def ldm_compare(ldm_pipeline: Pipeline) -> Callable[..., dict[str, Any]]:
    """`ldm_compare(candidate, reference=ldm_pipeline, *, prompts, seeds, **options)`: `quality` as report.json has it.

    Both are a pipeline (called with a prompt, `seed=` and the options, returning uint8 (1, H, W, 3)) or images uint8
    (n, H, W, 3), drawn for every seed of the first prompt, then of the second, and so on; the bundle's report prompts
    and seeds unless others are given. Raises `EvaluationError` for NaN or a flat image, and `ValueError` for images
    that do not compare.
    """
    return lambda candidate, reference=ldm_pipeline, **options: _compare(ldm_pipeline, candidate, reference, **options)


def _compare(
    pipeline: Pipeline,
    candidate: Any,
    reference: Any,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    from ldm_deploy.errors import EvaluationError
    from ldm_deploy.eval.grid import load_grid
    from ldm_deploy.eval.lpips_distance import Lpips
    from ldm_deploy.eval.metrics import check_pair
    from ldm_deploy.eval.quality import compare_images, constant_images, flat_reason

    pairs = load_grid(prompts or pipeline.model.get("prompts", {}).get("report"), seeds).pairs
    expected, found = (_drawn(source, pairs, options) for source in (reference, candidate))
    check_pair(expected, found)
    flat = flat_reason(constant_images(found, pairs), constant_images(expected, pairs))
    if flat is not None:
        raise EvaluationError(flat)
    return compare_images(expected, found, pairs, Lpips())[0]


def _drawn(source: Any, pairs: Sequence[tuple[str, int]], options: dict[str, Any]) -> np.ndarray:
    import numpy as np

    from ldm_deploy.errors import EvaluationError

    images = (
        np.concatenate([source(prompt, seed=seed, **options) for prompt, seed in pairs]) if callable(source) else source
    )
    images = np.asarray(images)
    if len(images) != len(pairs):
        raise ValueError(f"{len(images)} images for {len(pairs)} prompts and seeds; give one for each")
    for image, (prompt, seed) in zip(images, pairs, strict=True):
        if not np.isfinite(image).all():
            raise EvaluationError(f"the image of {prompt!r}, seed {seed} holds NaN or infinity")
    return images
