"""data/prepare.py: what it builds, and what it says when a package is wrong or cannot be had."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, read_rows

sys.path.insert(0, str(ROOT / "data"))
import prepare  # noqa: E402

WORLD = ROOT / "data" / "world"


def test_the_factbook_is_read_as_it_stands():
    rows = read_rows(WORLD / "countries.jsonl")
    page = {r["field"]: r["text"] for r in rows if r["title"] == "Sudan"}
    assert page["Coastline"] == "853 km"
    assert page["Land boundaries"].startswith("total: 6,819 km; border countries: Central Afr")
    assert "Chad 1,403 km" in page["Land boundaries"] and "<" not in page["Background"]
    assert len({r["title"] for r in rows}) == 254 and 30_000 < len(rows) < 33_000
    assert len({json.dumps(r) for r in rows}) == len(rows), "a passage stands there twice"
    titles = {r["title"] for r in rows}
    assert {"Myanmar", "Dominican Republic", "Democratic Republic of the Congo"} <= titles


def test_the_elements_are_another_domain():
    rows = read_rows(WORLD / "elements.jsonl")
    page = {r["field"]: r["text"] for r in rows if r["title"] == "Hydrogen"}
    assert page["Symbol"] == "H" and page["Atomic number"] == "1"
    assert len({r["title"] for r in rows}) == 118


def test_markup_becomes_plain_text():
    assert prepare.plain("<p>C&ocirc;te  d'Ivoire<br><br>is&nbsp;a <em>state</em></p>") \
        == "C\u00f4te d'Ivoire; is a state"
    field = {"total": {"text": "6 km"}, "arable": {"text": "arable: 5%"}, "note": "<b>note:</b> x"}
    assert prepare.field_text(field) == "total: 6 km; arable: 5%; note: x"


@pytest.mark.parametrize("outcome, says", [
    ((1, "WARNING: x\nERROR: No matching distribution found"), "could not fetch mendeleev==1.3.0"),
    ((0, ""), "SHA-256 is not the pinned one")])
def test_a_package_that_is_wrong_or_out_of_reach_is_one_line(tmp_path, monkeypatch, capsys, outcome,
                                                             says):
    code, stderr = outcome

    def pip(command, **kwargs):
        if code == 0:
            (tmp_path / "mendeleev-1.3.0-py3-none-any.whl").write_bytes(b"not the wheel")
        return SimpleNamespace(returncode=code, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(SystemExit) as stop:
        prepare.fetch("mendeleev==1.3.0", tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(lines) == 2 and says in lines[1]
    assert not list(tmp_path.iterdir()), "a wrong file stays behind"


def test_what_is_there_is_left_alone():
    before = {p: p.stat().st_mtime_ns for p in WORLD.iterdir()}
    done = subprocess.run([sys.executable, ROOT / "data" / "prepare.py"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "ready" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in WORLD.iterdir()} == before
