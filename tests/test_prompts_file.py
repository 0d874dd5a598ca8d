"""Files of prompts are what their suffix says; options of the commands are given once. Whatever is wrong is one message."""

import json
import re
import sys

import pandas as pd
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from ppl_lm.cli.app import app
from ppl_lm.run.prompts_file import READERS, read_prompts

TEXTS = ["The soup was", 'He said "no",\nand left', "café"]
COLUMNS = {"k": [1, 2, 30], "x": [0.5, -2.0, 1000.0], "code": ["007", "x", "1"], "note": ["", "NA", "null"]}


def rows():
    return [{"prompt": t, **{k: v[i] for k, v in COLUMNS.items()}} for i, t in enumerate(TEXTS)]


def frame():
    return pd.DataFrame({"prompt": TEXTS, **COLUMNS})


WRITERS = {
    ".csv": lambda path: frame().to_csv(path, index=False),
    ".tsv": lambda path: frame().to_csv(path, index=False, sep="\t"),
    ".CSV": lambda path: path.write_text(frame().to_csv(index=False), encoding="utf-8-sig"),
    ".parquet": lambda path: frame().to_parquet(path),
    ".json": lambda path: path.write_text(json.dumps(rows(), indent=2)),
    ".jsonl": lambda path: path.write_text("\n".join(map(json.dumps, rows()))),
    ".ndjson": lambda path: path.write_text("\n\n".join(map(json.dumps, rows())), encoding="utf-8-sig"),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_tables_are_read_as_what_they_are(tmp_path, suffix):
    """Also where a text is what a table reader may take for a number or for nothing."""
    path = tmp_path / f"p{suffix}"
    WRITERS[suffix](path)
    assert read_prompts(path) == (TEXTS, COLUMNS)
    assert [type(v) for v in read_prompts(path)[1]["k"]] == [int] * 3


def test_texts_and_chats(tmp_path):
    chats = [[{"role": "user", "content": t}] for t in TEXTS]
    (tmp_path / "strings.json").write_text(json.dumps(TEXTS))
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    (tmp_path / "lines.json").write_text("\n".join(json.dumps({"prompt": t}) for t in TEXTS))
    pd.DataFrame({"prompt": chats}).to_parquet(tmp_path / "chats.parquet")
    (tmp_path / "number.csv").write_text("prompt\n12\n")
    (tmp_path / "p.txt").write_text("prompt,k\n1,2\n")
    (tmp_path / "p").write_text("one\n")
    assert read_prompts(tmp_path / "strings.json") == read_prompts(tmp_path / "lines.json") == (TEXTS, {})
    assert read_prompts(tmp_path / "chats.json") == read_prompts(tmp_path / "chats.parquet") == (chats, {})
    assert read_prompts(tmp_path / "number.csv") == (["12"], {})
    assert read_prompts(tmp_path / "p.txt") == (["prompt,k", "1,2"], {})
    assert read_prompts(tmp_path / "p") == (["one"], {}) and read_prompts(None) == ([""], {})


BAD = {
    "suffix": ("p.xlsx", b"PK", "suffix that is not read; give one of .txt, .csv, .*a text file .* is a .txt"),
    "latin-1": ("p.txt", b"a\n\ncaf\xe9\n", r"line 3 is not UTF-8 \(byte 0xe9\); save the file as UTF-8"),
    "latin-1 table": ("p.csv", b"prompt\ncaf\xe9\n", "line 2 is not UTF-8"),
    "utf-16": ("p.jsonl", "{}".encode("utf-16"), "line 1 is not UTF-8"),
    "empty": ("p.txt", b" \n\n", "is empty; give one prompt a line"),
    "header alone": ("p.csv", b"prompt,k\n", "is empty"),
    "no header": ("p.csv", b"The soup was,1\n", r"line 1 names the columns \['The soup was', '1'\].* 'prompt'"),
    "semicolons": ("p.csv", b"prompt;k\na;1\n", r"names the columns \['prompt;k'\]"),
    "twice": ("p.csv", b"prompt,prompt\na,b\n", "each once"),
    "cells": ("p.csv", b'prompt,k\n"a\nb",1\n\na,1,2\n', "line 5 has 3 cells, the first 2: prompt, k"),
    "quotes": ("p.csv", b'prompt\n"a" b\n', "line 2: "),
    "no json": ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not JSON"),
    "array": ("p.json", b'[{"prompt": "a"},]', "is not JSON"),
    "deep": ("p.json", b"[" * 100_000, "is not JSON"),
    "keys": (
        "p.jsonl",
        b'{"prompt": "a", "k": 1}\n{"prompt": "b"}\n',
        "line 2 has prompt; each needs 'prompt', and the keys",
    ),
    "no prompt": ("p.json", b'[{"prompt": "a"}, {"text": "b"}]', "row 2 has text; each needs 'prompt'"),
    "no row": ("p.jsonl", b"3\n", "line 1 has int, no keys"),
    "null": ("p.jsonl", b'{"prompt": null}\n', "line 1 has the prompt None; give a text"),
    "too large": ("p.jsonl", b'{"prompt": "a", "k": 1e999}\n', "line 1 .*1e999 is no number that float64 can hold"),
    "NaN": ("p.jsonl", b'{"prompt": "a", "k": NaN}\n', "line 1 .*NaN is no number"),
    "digits": ("p.jsonl", b'{"prompt": "a", "k": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
    "surrogate": (
        "p.jsonl",
        rb'{"prompt": "a"}' + b"\n" + rb'{"prompt": "\ud83d"}',
        "line 2 has half of a surrogate pair",
    ),
    "surrogate beside": ("p.json", rb'[{"prompt": "a", "k": ["\udc00"]}]', "row 1 has half of a surrogate pair"),
    "no parquet": ("p.parquet", b"prompt\na\n", "is no Parquet file that can be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_names_file_and_line(tmp_path, case):
    name, data, message = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"prompts='.*{re.escape(name)}'.*{message}"):
        read_prompts(tmp_path / name)


def test_what_a_run_cannot_write_down_is_refused(tmp_path):
    pd.DataFrame({"prompt": ["a"], "when": pd.to_datetime(["2020-01-01"])}).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(
        ValueError,
        match="p.parquet.*row 1 holds what JSON cannot write down .*(datetime|Timestamp).*leave that column out",
    ):
        read_prompts(tmp_path / "p.parquet")


def test_without_pyarrow_the_message_says_what_to_give(tmp_path, monkeypatch):
    frame().to_parquet(tmp_path / "p.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="needs pyarrow .*or give the table as .jsonl"):
        read_prompts(tmp_path / "p.parquet")
    assert ".parquet" in READERS


def test_the_commands_read_them_too(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,k\nThe soup was,1\n")
    (tmp_path / "l.txt").write_bytes(b"caf\xe9")
    sample = ["sample", "tilted", "--max-new-tokens", "4", "--num-samples", "2", "--output-dir", str(tmp_path / "out")]
    assert CliRunner().invoke(app, [*sample, "--prompts", str(tmp_path / "p.csv")]).exit_code == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    assert (settings["prompts"], settings["columns"]) == (["The soup was"], {"k": [1]})
    bad = CliRunner().invoke(app, [*sample, "--overwrite", "--prompts", str(tmp_path / "l.txt")])
    assert bad.exit_code == 2 and "l.txt" in bad.output and "line 1 is not UTF-8" in bad.output


# ----- options -----

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = [
    (c, p.opts[0])
    for c, command in COMMANDS.items()
    for p in command.params
    if p.param_type_name == "option" and not p.is_flag and not p.multiple and p.opts[0] != "--help"
]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_an_option_given_twice_is_refused(command, option):
    result = CliRunner().invoke(app, [command, "x", option, "1", f"{option}=1"])
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", result.output)
    assert result.exit_code == 2 and f"{option} is given 2 times, but takes one value: give it once" in text


def test_flags_may_be_repeated():
    result = CliRunner().invoke(app, ["report", "nowhere", "--traceback", "--traceback"])
    assert result.exit_code == 2 and "times" not in result.output


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_system(tmp_path, end):
    (tmp_path / "p.txt").write_bytes(end.join(["one", "", "two", "three"]).encode() + end.encode())
    assert read_prompts(tmp_path / "p.txt") == (["one", "two", "three"], {})


def test_what_json_cannot_hold_is_refused_in_every_kind_of_file(tmp_path):
    pd.DataFrame({"prompt": ["a", "b"], "k": [1.0, float("inf")]}).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="row 2 holds what JSON cannot write down"):
        read_prompts(tmp_path / "p.parquet")
