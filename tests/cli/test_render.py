"""What is printed arrives as it is: paths are not wrapped, and nothing in them is markup or an emoji."""

import json

from pmm_edge.console import note, print_json, print_plain, print_table, progress

PATH = "/data/" + "a long name " * 15 + "/:smile:/[bold]x"


def test_json_is_what_programs_read(capsys):
    print_json({"folder": PATH})
    assert json.loads(capsys.readouterr().out) == {"folder": PATH}


def test_plain_text_keeps_every_character(capsys):
    print_plain(f"{PATH}\t{PATH}\n")
    assert capsys.readouterr().out == f"{PATH}\t{PATH}\n"


def test_a_note_and_a_table_keep_the_colons_of_a_path(capsys):
    note("in /:smile:/x")
    print_table("in /:smile:/x", (":smile:", "y"), [(":bug:", ":car:")])
    printed = capsys.readouterr()
    assert ":smile:" in printed.err
    assert [printed.out.count(code) for code in (":smile:", ":bug:", ":car:")] == [2, 1, 1]


def test_a_table_s_title_stays_one_line(capsys):
    path = PATH.replace("[bold]", "")
    print_table(f"in {path}", ("a", "b"), [("c", "1")])
    assert capsys.readouterr().out.splitlines()[0] == f"in {path}"


def test_progress_shows_names_as_they_are(capsys):
    with progress() as report:
        report("exporting :smile:[bold].onnx", 1, 1, "[red]:bug:")
    assert "exporting :smile:[bold].onnx" in (shown := capsys.readouterr().err) and "[red]:bug:" in shown
