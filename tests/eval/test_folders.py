"""Folders of images: the same numbers however they are computed, in bounded memory, resumed after a kill."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

from ldm_deploy.errors import ArtifactError, ConfigError, DataError, EvaluationError
from ldm_deploy.eval import folders, shards
from ldm_deploy.eval.budget import load_budget
from ldm_deploy.eval.folders import compare_folders, exit_code
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.quality import compare_images
from ldm_deploy.eval.report import schema
from tests.eval.factories import absent_lpips

COUNT, SIZE = 30, 32


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 8)


@pytest.fixture
def without_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "Lpips", absent_lpips)


def make(folder: Path, count: int = COUNT, size: int = SIZE, seed: int = 0) -> tuple[Path, Path]:
    """(reference, candidate): smooth pictures, and the same with noise."""
    rng = np.random.default_rng(seed)
    both = folder / "reference", folder / "candidate"
    for path in both:
        path.mkdir(parents=True)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(30, 220, (4, 4, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
        noisy = np.clip(image + rng.normal(0, 1 + index / 9, image.shape), 0, 255).astype(np.uint8)
        for path, pixels in zip(both, (image, noisy), strict=True):
            Image.fromarray(pixels).save(path / f"{index:04d}.png")
    return both


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make(tmp_path)


def numbers(report: dict[str, Any], out: Path) -> tuple[Any, str]:
    return report["quality"], (out / "images.csv").read_text()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the index of every shard that is measured."""
    seen: list[int] = []

    def measure_all(todo: list[Any], processes: int, address: str | None) -> Iterator[Any]:
        seen.extend(shard.index for shard in todo)
        return ((shard, shards.measure_shard(shard)) for shard in todo)

    monkeypatch.setattr(folders, "measure_all", measure_all)
    return seen


@pytest.mark.usefixtures("without_lpips")
def test_one_process_and_three_give_the_same_bits_which_are_those_of_all_in_memory(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    reference, candidate = pair
    found = []
    for processes in (1, 3):
        out = tmp_path / f"out{processes}"
        found.append(numbers(compare_folders(candidate, reference, out, processes=processes), out))
        assert not (tmp_path / f"out{processes}.shards").exists()
    assert found[0] == found[1]
    names = sorted(path.name for path in reference.iterdir())
    images = [np.stack([np.asarray(Image.open(folder / name)) for name in names]) for folder in pair]
    quality, entries = compare_images(*images, [(name, 0) for name in names], absent_lpips())
    for figure in (*quality.values(), *found[0][0].values()):
        figure.pop("worst_image", None)
    assert found[0][0] == quality
    rows = list(csv.DictReader(found[0][1].splitlines()))
    assert [row["file"] for row in rows] == names
    for name in ("psnr_db", "ssim", "ms_ssim", "delta_e2000", "tile_psnr_db"):
        assert [float(row[name]) for row in rows] == [entry[name] for entry in entries]
    assert [float(row["shift_green"]) for row in rows] == [entry["colour_shift"][1] for entry in entries]


@pytest.mark.slow
def test_with_lpips_too_the_number_of_processes_changes_no_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    if not Lpips().available:
        pytest.skip(str(Lpips().reason))
    found = []
    for processes in (1, 3):
        out = tmp_path / f"out{processes}"
        found.append(numbers(compare_folders(pair[1], pair[0], out, processes=processes), out))
    assert found[0] == found[1]
    assert found[0][0]["lpips"]["mean"] > 0
    assert found[0][0]["frechet_distance"]["value"] > 0


@pytest.mark.slow
def test_a_ray_cluster_of_two_workers_gives_the_same_bits(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    reports = []
    for processes, address in ((1, None), (2, "local")):
        out = tmp_path / f"out{processes}"
        report = compare_folders(pair[1], pair[0], out, processes=processes, ray_address=address)
        reports.append(numbers(report, out))
    assert reports[0] == reports[1]


@pytest.mark.usefixtures("without_lpips")
def test_without_ray_the_message_says_what_to_install(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ldm-deploy\[ray\]', or leave --ray out"):
        compare_folders(pair[1], pair[0], tmp_path / "out", ray_address="auto")


KILLED = """
import sys, time
from pathlib import Path
from tests.eval.factories import absent_lpips
from ldm_deploy.eval import folders, shards
if __name__ == "__main__":
    shards.SHARD = 2
    folders.Lpips = absent_lpips
    write = folders.write_shard
    folders.write_shard = lambda *arguments: (time.sleep(0.2), write(*arguments))
    folders.compare_folders(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), processes=2)
"""


@pytest.mark.usefixtures("without_lpips")
def test_a_killed_run_goes_on_where_it_stopped_and_leaves_no_process(
    pair: tuple[Path, Path], tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setattr(shards, "SHARD", 2)
    reference, candidate = pair
    out, folder = tmp_path / "out", tmp_path / "out.shards"
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    run = subprocess.Popen(
        [sys.executable, str(script), str(candidate), str(reference), str(out)],
        env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while len(list(folder.glob("*.npz"))) < 3:
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not out.exists()
    stored = sorted(int(path.stem) for path in folder.glob("*.npz"))
    assert 3 <= len(stored) < COUNT // 2
    while _session_lives(run.pid):  # the workers see that their parent is gone; pytest's own limit ends a wait in vain
        time.sleep(0.05)
    resumed = numbers(compare_folders(candidate, reference, out), out)
    assert sorted({*counted, *stored}) == list(range(COUNT // 2))
    assert not set(counted) & set(stored)
    assert resumed == numbers(compare_folders(candidate, reference, tmp_path / "again"), tmp_path / "again")


def _session_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.usefixtures("without_lpips")
def test_only_what_changed_is_measured_again(
    pair: tuple[Path, Path], tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, candidate = pair
    out = tmp_path / "out"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders, "summarise", stop)
        with pytest.raises(KeyboardInterrupt):
            compare_folders(candidate, reference, out)
    counted.clear()
    Image.fromarray(np.full((SIZE, SIZE, 3), 9, np.uint8)).save(candidate / "0009.png")
    damaged = tmp_path / "out.shards" / "000003.npz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    report = compare_folders(candidate, reference, out)
    assert counted == [1, 3]
    assert (report["status"], report["constant"]) == ("failed", ["0009.png"])


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from tests.eval.factories import absent_lpips
from ldm_deploy.eval import folders, lpips_distance, shards
from ldm_deploy.eval.memory import peak_memory_bytes

def present(backbone="squeeze"):
    lpips = absent_lpips()
    lpips.reason = None
    return lpips

def measure_pairs(reference, candidate, lpips):
    kept.append((reference, candidate) if keep else None)
    count = len(reference)
    one = {name: reference.mean(axis=(1, 2, 3)) for name in folders.METRICS}
    one |= {"mse": np.ones(count), "tile_at": np.zeros((count, 2), int), "colour_shift": np.zeros((count, 3))}
    features = reference.reshape(count, -1)[:, :48] / 256
    return one | {"reference_features": features, "candidate_features": features + 0.1}, {}

kept, keep = [], sys.argv[4] == "keep"
shards.SHARD = 16
shards.measure_pairs = measure_pairs
folders.Lpips = lpips_distance.Lpips = present
folders.measure_all = lambda todo, *_: ((shard, shards.measure_shard(shard)) for shard in todo)
folders.compare_folders(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
print(peak_memory_bytes())
"""


def test_ten_times_the_images_take_the_same_memory(tmp_path: Path, root: Path) -> None:
    """The metrics are stand-ins, for speed; reading, storing, merging, intervals and distances are not."""
    (tmp_path / "run.py").write_text(MEMORY)
    paths = {}
    for count in (40, 400):
        paths[count] = make(tmp_path / str(count), 4, 128)
        for folder in paths[count]:
            for index in range(4, count):
                os.link(folder / f"{index % 4:04d}.png", folder / f"{index:04d}.png")

    def peak(count: int, how: str) -> int:
        reference, candidate = paths[count]
        command = [sys.executable, tmp_path / "run.py", candidate, reference, tmp_path / f"out{count}{how}", how]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    few = peak(40, "stream")
    assert peak(400, "stream") < 1.1 * few
    assert peak(400, "keep") > 1.3 * few  # what it looks like if images are kept: the test can fail


def kill_worker(shard: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("without_lpips")
def test_a_worker_that_dies_is_named_with_the_way_on(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_measure_alone", kill_worker)
    with pytest.raises(EvaluationError, match="died, probably for want of memory; run the same command again with a"):
        compare_folders(pair[1], pair[0], tmp_path / "out", processes=1)


@pytest.mark.usefixtures("without_lpips")
def test_a_bad_image_costs_only_its_shard(pair: tuple[Path, Path], tmp_path: Path, counted: list[int]) -> None:
    reference, candidate = pair
    good = (candidate / "0020.png").read_bytes()
    Image.fromarray(np.zeros((SIZE, SIZE + 1, 3), np.uint8)).save(candidate / "0020.png")
    with pytest.raises(DataError, match=r"0020\.png is 32x33, .*is 32x32"):
        compare_folders(candidate, reference, tmp_path / "out")
    (candidate / "0020.png").write_bytes(good)
    counted.clear()
    compare_folders(candidate, reference, tmp_path / "out")
    assert counted == [2, 3]


@pytest.mark.usefixtures("without_lpips", "counted")
class TestCommandLine:
    def test_report_and_gates(
        self, ldm_deploy_cli: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        reference, candidate = pair
        out = tmp_path / "report"
        done = ldm_deploy_cli("eval", candidate, "--reference", reference, "--out", out)
        assert done.code == 0, done.err  # progress may be told there
        assert f"{candidate} against {reference}: {COUNT} images" in done.out
        assert "lpips: not measured: no weights" in done.out
        report = json.loads((out / "report.json").read_text())
        rules = {"$defs": schema()["$defs"], "$ref": "#/$defs/quality"}
        jsonschema.Draft202012Validator(rules).validate(report["quality"])
        rows = list(csv.DictReader((out / "images.csv").read_text().splitlines()))
        worst = min(rows, key=lambda row: float(row["psnr_db"]))
        assert report["quality"]["psnr_db"]["worst_image"] == {"file": worst["file"]}
        assert report["gates"] == []
        assert (out / "report.md").read_text().startswith(f"**{candidate} against {reference}")
        budget = tmp_path / "budget.toml"
        for limits, code in (
            ("psnr_db_min = 20.0\nspeedup_min = 1.0\nrequired = ['speedup_min']", 0),  # only what images can show
            ("psnr_db_min = 60.0", 3),
            ("lpips_max = 0.1", 0),
            ("lpips_max = 0.1\nrequired = ['lpips_max']", 4),
        ):
            budget.write_text(f"format = 1\n[default]\n{limits}\n")
            done = ldm_deploy_cli("eval", candidate, "--reference", reference, "--out", out, "--budget", budget)
            assert done.code == code, done
        assert "lpips_max 0.1: not measured: no weights" in done.out

    def test_constant_images_fail_by_name(
        self, ldm_deploy_cli: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        for name in ("0003.png", "0007.png"):
            Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(pair[1] / name)
        done = ldm_deploy_cli("eval", pair[1], "--reference", pair[0], "--out", tmp_path / "out")
        assert done.code == 3
        assert "failed: 0003.png and 1 more of the candidate is constant (one flat colour)" in done.out

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("empty", "holds no images"),
            ("names", "lacks 0005.png: images are paired by file name"),
            ("grey", r"0005.png is grey (mode L); save it as RGB"),
            ("size", "0005.png is 16x16"),
        ],
    )
    def test_bad_images_are_one_line(
        self, ldm_deploy_cli: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path, fault: str, message: str
    ) -> None:
        reference, candidate = pair
        if fault == "empty":
            candidate = tmp_path / "empty"
            candidate.mkdir()
        elif fault == "names":
            (candidate / "0005.png").unlink()
        elif fault == "grey":
            Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(candidate / "0005.png")
        else:
            Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(candidate / "0005.png")
        done = ldm_deploy_cli("eval", candidate, "--reference", reference, "--out", tmp_path / "out")
        assert done.code == 1
        assert message in done.err
        assert done.err.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_what_is_for_folders_is_refused_for_a_bundle(
        self, ldm_deploy_cli: Callable[..., Any], tmp_path: Path
    ) -> None:
        for option in (("--processes", "2"), ("--ray", "auto")):
            done = ldm_deploy_cli("eval", tmp_path / "bundle", *option)
            assert (done.code, "--processes and --ray are for two folders of images" in done.err) == (2, True)

    def test_a_folder_of_images_needs_what_to_compare_with(
        self, ldm_deploy_cli: Callable[..., Any], pair: tuple[Path, Path]
    ) -> None:
        done = ldm_deploy_cli("eval", pair[1])
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "is a folder of images; give the images to compare them with: --reference DIR" in done.err


@pytest.mark.usefixtures("without_lpips")
def test_files_of_somebody_else_are_not_replaced(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ArtifactError, match="was not written by ldm-deploy"):
        compare_folders(pair[1], pair[0], tmp_path / "mine")


def test_exit_codes() -> None:
    def report(result: str, required: bool, status: str = "ok") -> dict[str, Any]:
        return {"status": status, "gates": [{"result": result, "required": required}]}

    assert exit_code(report("pass", True)) == 0
    assert exit_code(report("fail", False)) == 3
    assert exit_code(report("not measured", True)) == 4
    assert exit_code(report("not measured", False)) == 0
    assert exit_code(report("pass", True, "failed")) == 3
    assert load_budget().limits_for("x").required
