"""Opt-in: 01, 02 and 03 against a real OpenAI-compatible server. Left out unless it is named:

    .venv/bin/transformers serve data/world/model --device cpu --port 8000
    NANOFACT_SERVER=http://127.0.0.1:8000/v1 NANOFACT_SERVER_MODEL=data/world/model \\
        .venv/bin/python -m pytest -rxs tests/test_real_server.py

The first needs `pip install "transformers[serving]"`; the second takes 4 minutes on a CPU. Any
other server and model will do. Nothing here says whether answers are good: a model of 135M
parameters seldom gives what 02 and 03 ask for, and then must be counted as such.
"""
import argparse
import os
import re

import pytest
from conftest import call, read_rows, write_rows

import common

SERVER, MODEL = os.environ.get("NANOFACT_SERVER"), os.environ.get("NANOFACT_SERVER_MODEL")
pytestmark = pytest.mark.skipif(not (SERVER and MODEL), reason="NANOFACT_SERVER(_MODEL) not set")
KEY = "sk-canary-0123456789"
SAID = "Bolivia is a landlocked country. It borders Peru and Chile."


def ask_server(script, *args, folder):
    """(exit code, closing block as {name: text}) of a stage that asks the server."""
    done = call(script, *args, "--base-url", SERVER, "--model", MODEL,
                "--cache", folder / "replies.sqlite", env={**os.environ, "OPENAI_API_KEY": KEY})
    assert "Traceback" not in done.stderr and KEY not in done.stdout + done.stderr, done.stderr
    return done.returncode, dict(re.findall(r"(?m)^(\w+): +(\S+)$", done.stderr))


def outcome(out):
    """(rows, rows set aside) of a finished stage; the key is in no file beside it."""
    files = [path for path in out.parent.iterdir() if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    aside = out.with_name(out.name + ".failed")
    return read_rows(out), read_rows(aside) if aside.exists() else []


def test_sampling(tmp_path):
    prompts = [{"id": f"p{i}", "topic": topic, "prompt": f"Write a sentence about {topic}."}
               for i, topic in enumerate(("rain", "bread"))]
    flags = ("--prompts", write_rows(tmp_path / "p.jsonl", prompts), "--n", 2, "--batch", 1,
             "--max-new-tokens", 24)
    made = []
    for name in ("once", "again"):  # the second time from the cache
        code, counted = ask_server("01_generate.py", *flags, "--out", tmp_path / name,
                                   folder=tmp_path)
        rows, failed = outcome(tmp_path / name)
        assert (code, failed) == (0, [])
        made.append(rows)
    assert made[0] == made[1] and counted["from_cache"] == "4" and "calls" not in counted
    assert [row["id"] for row in rows] == ["p0/0", "p0/1", "p1/0", "p1/1"]
    for row in rows:
        assert row["finish"] in ("stop", "length") and 1 <= len(row["response"].split()) <= 24


def test_decomposing(tmp_path):
    row = {"id": "bolivia/0", "topic": "Bolivia", "response": SAID, "finish": "stop"}
    code, counted = ask_server("02_decompose.py", "--method", "llm", "--max-tokens", 96, "--out",
                               tmp_path / "f", "--in", write_rows(tmp_path / "s.jsonl", [row]),
                               folder=tmp_path)
    rows, failed = outcome(tmp_path / "f")
    assert len(rows) + len(failed) == 1 and code == len(failed) and int(counted["calls"]) >= 1
    for found in failed:
        assert found.items() > row.items() and "no reply was what" in found["error"]
        assert int(counted["not_as_asked"]) >= common.TRIES
    for found in rows:
        assert [sentence["text"] for sentence in found["sentences"]] == [
            "Bolivia is a landlocked country.", "It borders Peru and Chile."]
        for sentence in found["sentences"]:
            assert SAID[sentence["start"]:sentence["end"]] == sentence["text"]
            assert all(fact["text"].strip() for fact in sentence["facts"])


def test_judging(tmp_path):
    pages = [{"title": "Bolivia", "field": "Coastline", "text": "0 km (landlocked)"},
             {"title": "Bolivia", "field": "Land boundaries", "text": "Chile 942 km, Peru 1212 km"}]
    sentence = {"text": SAID[:32], "start": 0, "end": 32,
                "facts": [{"text": "Bolivia is landlocked"}]}
    row = {"id": "bolivia/0", "topic": "Bolivia", "response": SAID[:32], "sentences": [sentence]}
    code, counted = ask_server("03_verify.py", "--method", "llm", "--out", tmp_path / "v",
                               "--in", write_rows(tmp_path / "f.jsonl", [row]),
                               "--corpus", write_rows(tmp_path / "c.jsonl", pages), folder=tmp_path)
    rows, failed = outcome(tmp_path / "v")
    assert len(rows) == 1 and failed == [] and int(counted["calls"]) >= 1
    fact = rows[0]["sentences"][0]["facts"][0]
    assert fact["label"] in ("S", "NS", "IR", None) and code == (fact["label"] is None)
    assert {page["text"] for page in fact["evidence"]} <= {page["text"] for page in pages}
    if fact["label"] is None:
        assert int(counted["not_as_asked"]) >= common.TRIES


def test_the_server_samples_and_stops(tmp_path):
    """What 01 takes for granted. `transformers serve` samples only where generation_config.json of
    the model says "do_sample": true, whatever temperature a request has."""
    ask, spent = common.chat(argparse.Namespace(
        base_url=SERVER, model=MODEL, cache="", dry_run=False, price_in=0.0, price_out=0.0))
    asked = [{"role": "user", "content": "Write a short story."}]
    replies = [ask(asked, lambda reply: reply, max_tokens=16, temperature=1.0, top_p=1.0, seed=seed)
               for seed in range(4)]
    assert {reply["finish"] for reply in replies} == {"length"}
    assert spent["calls"] == 4 and spent["tokens_out"] == 64 and spent["tokens_in"] >= 4 * 4
    if len({reply["text"] for reply in replies}) == 1:
        pytest.xfail("it decodes greedily: --n > 1 and asking again are in vain")
