"""Container files install what pyproject.toml declares and copy what the package needs. They are not built here."""

import re
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").iterdir())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_container_files(file: Path) -> None:
    text, project = file.read_text(), msgspec.toml.decode((ROOT / "pyproject.toml").read_text())["project"]
    ((extra, more),) = re.findall(r"pip install --no-cache-dir '\.\[(\w+)\]'(?: '(.*)')?", text)
    assert extra in project["optional-dependencies"]
    requirements = [one for group in project["optional-dependencies"].values() for one in group]
    assert not more or more in requirements
    assert any(one.startswith("cuda-python") for one in [*project["optional-dependencies"][extra], more])
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()]
    assert {"pyproject.toml", "pmm_edge", project["readme"], *project["license-files"]} == set(copied)
    assert all((ROOT / name).exists() for name in copied)
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    page = (ROOT / "docs" / "docker.md").read_text()
    assert all(said in page for said in (f"docker/{file.name}", base.rpartition("/")[2]))
