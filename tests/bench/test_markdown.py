"""The Markdown is a comment that GitHub renders as meant, whatever files are called."""

import re
from dataclasses import replace
from pathlib import Path

from report_sample import passing_report, sample_report

from pmm_edge.bench.report import Invariant
from pmm_edge.bench.tables import escaped, markdown


def test_it_says_the_verdict_the_tables_and_the_machine(tmp_path: Path) -> None:
    text = markdown(sample_report(tmp_path))
    assert text.startswith("### ❌ pmm bench: fails\n\n1 of 4 models fails: model-bgr.onnx cosine 0.712345")
    assert "likely cause: the input is BGR" in text
    assert "| model-fp16.onnx | 0.999987 |" in text
    assert "46.41 -0.29 (-0.49…-0.09)" in text
    assert "AMD EPYC" in text
    assert markdown(passing_report(tmp_path)).startswith("### ✅ pmm bench: passes")


def test_a_stream_and_a_broken_invariant_are_told(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    text = markdown(report)
    assert "**Single crops from several clients" in text
    assert "**Invariants**" not in text  # all hold
    broken = replace(report.models[0], invariants=[Invariant("batch size", False, "batch 8 differs")])
    text = markdown(replace(report, models=[broken]))
    assert "**Invariants**" in text
    assert re.search(r"\| model\.onnx \|.* broken \|", text)


def test_a_model_that_was_not_judged_is_said_to_be(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    text = markdown(replace(report, models=[replace(report.models[0], parity=None)], complete=False))
    assert re.search(r"\| model\.onnx \|.* not judged \|", text)
    assert "passes" not in text


def test_every_row_has_its_tables_columns(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    odd = replace(
        report, models=[replace(model, path=f"a|b{number}\n.onnx") for number, model in enumerate(report.models)]
    )
    for block in re.findall(r"(?:^\|.*\n)+", markdown(odd), re.M):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1


def test_names_mention_nobody_and_start_nothing() -> None:
    assert escaped("<img src=x>`a`|b*c_d") == r"\<img src=x\>\`a\`\|b\*c\_d"
    assert "@octocat" not in escaped("by @octocat")
    assert "#12" not in escaped("see #12")
    assert "\n" not in escaped("a\n# b")
