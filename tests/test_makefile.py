"""The Makefile and .ci/run, with a stand-in for Python: no network, no installation, no test run inside a test run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TARGETS = (
    "help",
    "setup",
    "export",
    "scoreboard",
    "test",
    "test-all",
    "lint",
    "train",
    "distill",
    "bench",
    "gpu-report",
    "clean",
)

# Stands in for `python3` and for .venv/bin/python: writes its arguments to $LOG, and makes a venv of itself.
STAND_IN = """#!/usr/bin/env bash
if [ "$1" = -c ]; then exit "${TOO_OLD:-0}"; fi
echo "python $*" >> "$LOG"
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin"
  cp "$0" "$3/bin/python"
  printf '#!/usr/bin/env bash\\necho "ldm-deploy $*" >> "$LOG"\\n' > "$3/bin/ldm-deploy"
  chmod +x "$3/bin/ldm-deploy"
fi
"""


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A folder with what `make` reads, and the stand-in as ./python."""
    tree = tmp_path / "clone"
    (tree / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run"):
        shutil.copy(root / name, tree / name)
    (tree / "python").write_text(STAND_IN)
    (tree / "python").chmod(0o755)
    return tree


def make(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    variables = {**kept, "PYTHON": "./python", "LOG": str(tree / "log"), **environment}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True, check=False)


def calls(tree: Path) -> list[str]:
    """What was run since the last look, without the question whether pip is there."""
    log = tree / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line for line in lines if line != "python -m pip --version"]


INSTALL = "python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[all-cpu,dev]"
FETCH = "python -m ldm_deploy.eval.fetch_backbone"


def test_help_gives_every_target_one_line(clone: Path) -> None:
    lines = make(clone, "help").stdout.splitlines()
    assert [line.split()[1] for line in lines] == list(TARGETS)
    assert all(len(line.split()) > 4 for line in lines)
    assert make(clone).stdout.splitlines() == lines


def test_export_sets_up_on_its_own_and_only_once(clone: Path) -> None:
    assert make(clone, "export").returncode == 0
    export = [
        "ldm-deploy optimize reference --target onnxruntime-cpu --out build/reference",
        "ldm-deploy optimize few-steps --target onnxruntime-cpu --out build/few-steps",
    ]
    assert calls(clone) == ["python -m venv .venv", INSTALL, FETCH, *export]
    assert make(clone, "export").returncode == 0
    assert calls(clone) == export


def test_test_sets_up_on_its_own_and_again_when_the_pins_change(clone: Path) -> None:
    run = "python -m pytest -n logical --maxprocesses 4 --dist loadscope -m not slow and not gpu"
    assert make(clone, "test").returncode == 0
    assert calls(clone) == ["python -m venv .venv", INSTALL, run]
    stamp = (clone / ".venv" / ".installed").stat().st_mtime
    os.utime(clone / "constraints.txt", (stamp + 10, stamp + 10))
    assert make(clone, "test").returncode == 0
    assert INSTALL in calls(clone)


def test_setup_tries_the_backbone_every_time_it_is_asked(clone: Path) -> None:
    make(clone, "setup")
    assert calls(clone)[-1] == FETCH
    make(clone, "setup")
    assert calls(clone) == [FETCH]
    make(clone, "export")
    assert FETCH not in calls(clone)


def test_an_old_python_is_refused_in_one_line(clone: Path) -> None:
    done = make(clone, "test", TOO_OLD="1")
    assert done.returncode != 0
    assert "older than Python 3.11" in done.stderr.splitlines()[0]
    assert calls(clone) == []


def test_the_gpu_report_needs_no_set_up_and_takes_it_where_it_is(clone: Path) -> None:
    """A machine with a GPU may have no network."""
    assert make(clone, "gpu-report").returncode == 0
    assert calls(clone) == ["python benchmarks/gpu_report.py"]
    make(clone, "setup")
    (clone / "python").write_text("#!/usr/bin/env bash\nexit 1\n")
    assert make(clone, "gpu-report").returncode == 0


def test_bench_is_the_bundle_and_what_stands_beside_its_peers(clone: Path) -> None:
    make(clone, "setup")
    calls(clone)
    assert make(clone, "bench").returncode == 0
    assert calls(clone) == [
        "ldm-deploy bench build/reference", "python benchmarks/export_unet.py",
        "python benchmarks/quantization.py unet71m",
    ]  # fmt: skip


def test_the_scoreboard_is_of_the_teacher_the_student_and_what_export_wrote(clone: Path) -> None:
    make(clone, "setup")
    calls(clone)
    assert make(clone, "scoreboard", "DATA=emoji.zip").returncode == 0
    assert calls(clone)[-1] == (
        "ldm-deploy eval reference --student build/reference --student pruned --student few-steps"
        " --student build/few-steps --data emoji.zip --out build/scoreboard"
    )


def test_distill_makes_a_student_of_the_shipped_reference(clone: Path) -> None:
    make(clone, "setup")
    calls(clone)
    assert make(clone, "distill", "DATA=emoji.zip", "RECIPE=decoder").returncode == 0
    assert calls(clone) == [
        "ldm-deploy distill reference --recipe decoder --data emoji.zip --out build/student-decoder --resume"
    ]


def test_a_failing_command_fails_make(clone: Path) -> None:
    make(clone, "setup")
    (clone / ".venv" / "bin" / "ldm-deploy").write_text("#!/usr/bin/env bash\nexit 3\n")
    assert make(clone, "export").returncode != 0


def test_clean_keeps_the_environment(clone: Path) -> None:
    make(clone, "setup")
    (clone / "build" / "reference").mkdir(parents=True)
    (clone / "tests" / "__pycache__").mkdir(parents=True)
    assert make(clone, "clean").returncode == 0
    assert not (clone / "build").exists()
    assert not (clone / "tests" / "__pycache__").exists()
    assert (clone / ".venv" / "bin" / "python").exists()


def test_ci_runs_make_test_with_what_lies_beside_the_clone(clone: Path) -> None:
    """With and without the optional inputs, and without a terminal."""
    (clone / "Makefile").write_text(
        'test:\n\t@echo "$${TORCH_HOME-none} $${LDM_DEPLOY_DATA-none}"; cat | wc -c; exit $${CODE-0}\n'
    )

    def ci(**more: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("TORCH_HOME", "LDM_DEPLOY_DATA")}
        kept = {key: value for key, value in kept.items() if not key.startswith(("MAKE", "MFLAGS"))}
        command = [str(clone / ".ci" / "run")]
        return subprocess.run(command, env={**kept, **more}, input="typed", capture_output=True, text=True, check=False)

    assert ci().stdout.split() == ["none", "none", "0"]
    shared = clone.parent / "shared"
    (shared / "torch_home").mkdir(parents=True)
    (shared / "datasets").mkdir()
    archive = shared / "datasets" / "noto-emoji-128.zip"
    archive.touch()
    assert ci().stdout.split() == [str(shared / "torch_home"), str(archive), "0"]
    assert ci(CODE="1").returncode != 0
