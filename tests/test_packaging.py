"""What a release holds, and that it installs: the sdist, the wheel, the sdist in an empty venv."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import tinysteer as ts

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[1]
PACKAGES = {
    "tinysteer": ROOT / "tinysteer",
    "tinysteer_kernels": ROOT / "kernels" / "tinysteer_kernels",
}
KINDS = {".py", ".json", ".safetensors", ".md", ".typed"}
BUILD = """
import sys
from hatchling.build import build_sdist, build_wheel
print(build_sdist(sys.argv[1]), build_wheel(sys.argv[1]))
"""
IMPORT = """
import json, pathlib, sys
import tinysteer as ts, tinysteer_kernels
text = ts.load(device="cpu").complete("What is an owl?", max_new_tokens=4)
folders = [pathlib.Path(package.__file__).parent for package in (ts, tinysteer_kernels)]
files = [str(path.relative_to(folder.parent)) for folder in folders for path in folder.rglob("*")
         if path.is_file() and "__pycache__" not in path.parts]
print(json.dumps({"folders": [str(folder) for folder in folders], "files": files, "text": text}))
"""


def run(*command, cwd: Path) -> str:
    """Its output; offline, and with nothing of this process's paths."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment | {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources() -> set[str]:
    """Every file of both packages, as an installation has it."""
    return {
        str(Path(package) / path.relative_to(folder))
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> tuple[Path, Path]:
    """An sdist and a wheel, made of this tree."""
    out = tmp_path_factory.mktemp("dist")
    sdist, wheel = run(sys.executable, "-c", BUILD, str(out), cwd=ROOT).split()[-2:]
    return out / sdist, out / wheel


@pytest.fixture(scope="module")
def installed(release, tmp_path_factory) -> dict:
    """What `IMPORT` prints in a venv that holds the sdist, away from this tree."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = str(folder / "bin" / "python")
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # torch need not come again
    install = ("install", "--quiet", "--no-deps", "--no-build-isolation", str(release[0]))
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    return json.loads(run(python, "-c", IMPORT, cwd=folder).splitlines()[-1]) | {"site": str(site)}


def test_both_packages_are_typed_and_hold_what_they_need(sources):
    assert {"tinysteer/py.typed", "tinysteer_kernels/py.typed"} <= sources
    assert {"tinysteer_kernels/tables.py", "tinysteer/assets/tiny-base/config.json"} <= sources
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"
    assert not [path for path in (ROOT / "kernels").rglob("*") if path.is_symlink()]


def test_the_wheel_holds_both_packages_and_nothing_else(release, sources):
    with zipfile.ZipFile(release[1]) as wheel:
        names = {name for name in wheel.namelist() if f"-{ts.__version__}.dist-info/" not in name}
    assert names == sources
    assert {Path(name).suffix or Path(name).name for name in names} <= KINDS | {"py.typed"}
    assert release[1].stat().st_size < 10_000_000


def test_the_sdist_holds_the_tree_and_nothing_else(release, sources):
    with tarfile.open(release[0]) as sdist:
        members = sdist.getmembers()
    assert all(member.isfile() for member in members), "no links: tools disagree about them"
    top = f"tinysteer-{ts.__version__}/"
    assert all(member.name.startswith(top) for member in members)
    names = {member.name.removeprefix(top) for member in members}
    kernels = {f"kernels/{name}" for name in sources if name.startswith("tinysteer_kernels/")}
    assert {name for name in sources if name.startswith("tinysteer/")} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert {name.split("/")[0] for name in names} == {
        *("tinysteer", "kernels", "tests", "bench"),
        *("README.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"),
    }
    assert {name for name in names if name.startswith("kernels/")} == {
        *kernels,
        "kernels/README.md",
        "kernels/metadata.json",
    }
    assert release[0].stat().st_size < 10_000_000


def test_the_sdist_installs_and_runs(installed, sources):
    assert installed["folders"] == [str(Path(installed["site"]) / name) for name in PACKAGES]
    assert set(installed["files"]) == sources
    assert installed["text"]
