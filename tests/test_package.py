"""What pip installs: the wheel in an environment of its own, far from the repository."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from batch_runs import CHECKPOINT
from conftest import ROOT
from packaging.requirements import Requirement

SUFFIXES = (".py", ".cu", ".cuh", ".typed", ".html")
pytestmark = pytest.mark.xdist_group("package")  # the wheel is built once


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy: setuptools leaves a folder beside the sources."""
    directory = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "blip2", "pyproject.toml", "README.md", "LICENSE", "requirements*.txt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.split():
        (directory / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "sources" / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"),
            *("-w", str(directory), str(directory / "sources")),
        ],
        check=True,
    )
    [built] = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """Programs of a fresh environment with the wheel in it; other packages are this one's."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False)
    paths = {"base": str(directory), "platbase": str(directory)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(directory),
            "install",
            "-q",
            "--no-deps",
            wheel,
        ],
        check=True,
    )
    return Path(sysconfig.get_path("scripts", "venv", paths))


def run(program: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_the_wheel_has_every_file_of_the_package(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("blip2/")}
    found = (path for path in (ROOT / "blip2").rglob("*") if path.suffix in SUFFIXES)
    assert files == {path.relative_to(ROOT).as_posix() for path in found}


def test_the_metadata_is_the_requirements_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert set(metadata.get_all("Provides-Extra")) == {"data", "gpu", "ray", "serve"}
    lines = [
        line
        for file in (
            *(f"requirements{name}.txt" for name in ("", "-data", "-gpu", "-ray", "-serve")),
        )
        for line in (ROOT / file).read_text().splitlines()
    ]
    named = filter(None, (line.partition("#")[0].strip() for line in lines))
    assert _parts(metadata.get_all("Requires-Dist")) == _parts(named)


def test_the_licence_and_the_version_are_the_repositorys(wheel, environment, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        [licence] = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    version = metadata["Version"]
    newest = re.search(r"^## (\d+\.\d+\.\d+) - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == version
    programs = [*environment.glob("blip2-*")]
    assert len(programs) == 5
    for program in programs:
        done = run(program, "--version", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"blip2-suite {version}\n")


def _parts(requirements: Iterable[str]) -> set[tuple[str, str, frozenset[str]]]:
    found = map(Requirement, requirements)
    return {(one.name, str(one.specifier), frozenset(one.extras)) for one in found}


def test_a_question_is_answered_far_from_the_repository(environment, tmp_path):
    scene = ROOT / "demo" / "scene.png"
    asked = ("--input_dir", scene, "--input_text", "What colour is the circle?")
    engines = ("--engine_dir", CHECKPOINT, "--opt_engine_dir", CHECKPOINT)
    done = run(environment / "blip2-run", *asked, *engines, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[A] red" in done.stdout
    code = (
        "import blip2, sys; print(blip2.__file__);"
        " print(blip2.load(sys.argv[1]).caption(sys.argv[2]))"
    )
    done = run(environment / "python", "-c", code, CHECKPOINT, scene, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    place, caption = done.stdout.splitlines()
    assert Path(place).is_relative_to(environment.parent)
    assert caption.startswith("a small red circle, a small orange triangle")


def test_the_programs_name_one_another_as_they_are_installed(environment, tmp_path):
    done = run(environment / "blip2-run", "--input_dir", "a.png", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("make them with: blip2-onnx-export\n") or (
        "make one with: blip2-convert-checkpoint" in done.stderr
    )
    done = run(
        *(
            environment / "blip2-convert-checkpoint",
            "--model_dir",
            CHECKPOINT,
            "--output_dir",
            "opt",
        ),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert f"blip2-run --engine_dir {CHECKPOINT} --opt_engine_dir opt" in done.stdout
    for name in ("blip2-onnx-export", "blip2-build-vit-qformer", "blip2-serve"):
        done = run(environment / name, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert done.stdout.startswith(f"usage: {name}")
