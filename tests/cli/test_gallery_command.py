"""pmm gallery: one session of add, search, info and delete, and wrong use in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from PIL import Image
from qdrant_client import QdrantClient

from pmm_edge import cli

WRONG_USE = {
    "search people data/query": "--model",
    "search nowhere e.npz": "nowhere",
    "search people e.npz --fmr 0.1": "pmm calibrate",
    "search people e.npz -o hits.gif": ".png",
    "search people e.npz --since noon": "noon",
    "search people e.npz --top 0": "top",
    "search people none.npz": "none.npz",
    "search people text.npz": "text.npz",
    "add people e.npz --distance cosine": "cosine",
    "add people e.npz --dtype float16": "float16",
    "add people data": "--model",
    "add data e.npz": "data is not a gallery",
    "add http://127.0.0.1:9 e.npz": "collection",
    "add http://127.0.0.1:9/people e.npz": "127.0.0.1:9",
    "delete people": "Name what to delete",
    "delete people --older-than 30": "30d",
    "info nowhere": "pmm gallery add",
}


def test_a_session(pmm: Callable, run: Path, tiny_dataset: Path) -> None:
    model, query = run / "export/model.onnx", next((tiny_dataset / "query").glob("0103_c1*"))
    add = ("gallery", "add", "people", tiny_dataset, "--split", "gallery", "--model", model, "--device", "cpu")
    assert pmm(*add, "--json").json | {"skipped": 0} == {"added": 12, "known": 0, "junk": 0, "skipped": 0, "rows": 12}
    assert "12 known" in pmm(*add).ok.stdout
    search = ("gallery", "search", "people", query, "--model", model, "-o", "hits.png", "--camera", "2", "--camera", 3)
    (found,) = pmm(*search, "--top", 5, "--json").json
    assert (found["verdict"], found["searched"], len(found["hits"])) == ("no threshold", 8, 5)
    assert {hit["camera"] for hit in found["hits"]} == {"2", "3"}
    assert Image.open("hits.png").width > 500
    first = found["hits"][0]
    assert Path(first["source"]).is_relative_to(tiny_dataset)
    printed = pmm(*search).ok.stdout
    assert str(first["pid"]) in printed
    header = next(line for line in printed.splitlines() if line.startswith("┃"))
    assert len(header) - header.index("┃", 1) <= 65  # of a terminal's 80 columns; the source is wrapped
    assert pmm("gallery", "delete", "people", "--source", first["source"], "--json").json == {"deleted": 1, "rows": 11}
    nothing = pmm("gallery", "delete", "people", "--source", Path(first["source"]).name)
    assert (nothing.exit_code, "--json" in nothing.stderr) == (0, True)
    assert "deleted 2 " in pmm("gallery", "delete", "people", "--pid", first["pid"]).ok.stdout
    info = pmm("gallery", "info", "people", "--check", "--json").json
    assert (info["rows"], info["identities"], info["cameras"]) == (9, 3, ["1", "2", "3"])
    assert "1,536" in pmm("gallery", "info", "people").ok.stdout


def test_wrong_use(pmm: Callable, run: Path, tiny_dataset: Path) -> None:
    Path("data").symlink_to(tiny_dataset)
    Path("text.npz").write_text("no archive")
    pmm("embed", run / "export/model.onnx", "data/query", "-o", "e.npz", "--device", "cpu").ok  # noqa: B018
    assert "added 12" in pmm("gallery", "add", "people", "e.npz").ok.stdout
    for arguments, reason in WRONG_USE.items():
        assert reason in pmm("gallery", *arguments.split()).error, arguments
    assert pmm("gallery", "info", "people", "--json").json["rows"] == 12


@pytest.mark.filterwarnings("ignore:.*[Ll]ocal:UserWarning")
def test_a_collection_of_qdrant(pmm: Callable, run: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, asked = QdrantClient(":memory:"), []
    monkeypatch.setattr("qdrant_client.QdrantClient", lambda **settings: asked.append(settings["url"]) or client)
    where, model = "http://server:6333/people", run / "export/model.onnx"
    query = next((tiny_dataset / "query").iterdir())
    assert pmm("gallery", "add", where, query.parent, "--model", model, "--pid", 7, "--camera", "door").exit_code == 0
    (found,) = pmm("gallery", "search", where, query, "--model", model, "--json").json
    assert (found["searched"], found["hits"][0]["pid"], found["hits"][0]["camera"]) == (12, 7, "door")
    assert pmm("gallery", "delete", where, "--pid", 7, "--json").json == {"deleted": 12, "rows": 0}
    assert set(asked) == {"http://server:6333"}


def test_missing_packages_and_help(pmm: Callable, pmm_without: Callable, tiny_onnx: Path, tmp_path: Path) -> None:
    for absent, place in (("faiss", tmp_path / "people"), ("qdrant_client", "http://127.0.0.1:9/people")):
        assert ".[gallery]" in pmm_without(absent, "gallery", "info", place).error
    in_bucket = ("gallery", "add", tmp_path / "people", "s3://bucket/crops", "--model", tiny_onnx, "--device", "cpu")
    assert ".[parquet]" in pmm_without("pyarrow", *in_bucket).error
    commands = typer.main.get_command(cli.app).commands["gallery"].commands
    assert list(commands) == ["add", "search", "delete", "info"]
    for name, command in commands.items():
        assert "--json" in {flag for parameter in command.params for flag in parameter.opts}
        assert pmm("gallery", name, "-h").stdout == pmm("gallery", name, "--help").stdout
