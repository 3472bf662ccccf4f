"""common.chat against a server that goes wrong (server.py); what counts is what the server counted.

`python tests/test_chat.py` measures the throughput of 1,000 calls.
"""
import gc
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import ROOT, read_rows, write_rows
from server import ERRORS, GARBAGE, serve

import common

PARAMS = {"max_tokens": 50, "temperature": 0.0, "seed": 0}
KEY = "sk-secret-0123456789abcdef"
STAGE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import common

def main():
    p = common.arguments("A stage that asks for each row's text.")
    p.add_argument("--model", default="echo")
    common.chat_arguments(p)
    args = p.parse_args()
    rows, failed = common.read_jsonl(args.inp, {"text": str}), 0
    ask, spent = common.chat(args)
    with common.output(args, rows) as (done, write, fail), common.workers(16) as pool:
        jobs = [(row, pool.submit(ask, [{"role": "user", "content": row["text"]}],
                                  lambda reply: reply["text"], max_tokens=50, temperature=0.0,
                                  seed=0)) for row in rows if row["id"] not in done]
        for row, job in jobs:
            try:
                write({**row, "reply": job.result()})
            except ConnectionError as error:
                fail(row, error)
                failed += 1
    common.report(**spent)
    return 1 if failed else 0

common.run(main)
"""


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def chat(base_url, cache="", **args):
    return common.chat(SimpleNamespace(**{
        "base_url": base_url, "model": "echo", "cache": str(cache), "dry_run": False,
        "price_in": 0.0, "price_out": 0.0, **args}))


def said(reply):
    return reply["text"]


def only(text):
    """A parser that takes no other reply."""
    return lambda reply: text if said(reply) == text else None


def user(text):
    return [{"role": "user", "content": text}]


def stage(tmp_path, rows, *flags, out="out.jsonl", **env):
    """The command of a stage on these rows, as arguments of subprocess.run or Popen."""
    (tmp_path / "stage.py").write_text(STAGE)
    write_rows(tmp_path / "rows.jsonl", rows)
    command = [sys.executable, tmp_path / "stage.py", ROOT, "--in", tmp_path / "rows.jsonl",
               "--out", tmp_path / out, "--cache", tmp_path / "replies.sqlite", *flags]
    return {"args": command, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            "env": {**os.environ, **env}}


def texts(n):
    return [{"id": f"{i}", "text": f"row {i}."} for i in range(n)]


def kept(path):
    return sqlite3.connect(path).execute("SELECT count(*) FROM replies").fetchone()[0]


# ---------------------------------------------------------------------------------------------
# Faults

@pytest.mark.parametrize("kind", ["429", "500", "drop", *GARBAGE])
def test_after_a_fault_the_reply_is_the_same(tmp_path, kind):
    """Asked again with what was asked, seed and all: a fault on the way moves no reply."""
    times = 1 if kind == "drop" else 2  # openai waits half a second after it
    with serve(script={"": [kind] * times}) as server:
        ask, spent = chat(server.url, tmp_path / "c", model="seed")
        assert ask(user("a"), said, **PARAMS) == "seed 0"
        counts = server.counts()
    assert (counts[kind], counts["good"], counts["requests"]) == (times, 1, times + 1)
    assert spent["calls"] == 1 == kept(tmp_path / "c")


@pytest.mark.parametrize("kind, tries", [
    ("429", 6), ("500", 6), ("400", 1), ("context", 1), *((kind, 3) for kind in GARBAGE)])
def test_what_does_not_come_is_an_error_and_not_kept(tmp_path, kind, tries):
    with serve(script={"": [kind] * tries}) as server:
        ask, spent = chat(server.url, tmp_path / "c")
        with pytest.raises(ConnectionError):
            ask(user("a"), said, **PARAMS)
        assert server.counts()["requests"] == tries
        assert kept(tmp_path / "c") == spent["calls"] == 0
        assert ask(user("a"), said, **PARAMS) == "a"  # no grudge: the fault is over


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError, match="http://127.0.0.1:9/v1"):  # all calls would fail
        chat("http://127.0.0.1:9/v1")[0](user("a"), said, **PARAMS)
    with serve() as server:
        ask, _ = chat(server.url)
        ask(user("a"), said, **PARAMS)
    with pytest.raises(ConnectionError):  # it was there, and may be there again
        ask(user("b"), said, **PARAMS)


def test_a_corpus_is_no_cache(tmp_path, capsys):
    path = tmp_path / "wiki.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE documents (title PRIMARY KEY, text)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        chat("http://127.0.0.1:9/v1", path)
    assert path.read_bytes() == before and capsys.readouterr().err.count("\n") == 1


def test_half_a_character_can_be_kept(tmp_path):
    with serve() as server:
        ask, _ = chat(server.url, tmp_path / "c", model="half-character")
        first, again = (ask(user("a"), said, **PARAMS) for _ in range(2))
    assert first == again and first.startswith("half of an emoji: ")
    first.encode()


# ---------------------------------------------------------------------------------------------
# Replies that are not what was asked for, and the cache

def test_unparsed_is_asked_again_and_never_kept(tmp_path):
    with serve() as server:
        ask, spent = chat(server.url, tmp_path / "c", model="seed")
        for _ in range(2):
            assert ask(user("a"), lambda reply: None, **{**PARAMS, "seed": 7}) is None
        assert kept(tmp_path / "c") == 0
        for _ in range(2):  # the third try of the first is kept, the second is free
            assert ask(user("a"), only("seed 9"), **{**PARAMS, "seed": 7}) == "seed 9"
            assert kept(tmp_path / "c") == 1
        seen = [(row["seed"], row["temperature"]) for row in server.seen()]
        assert seen == [(7, 0), (8, .7), (9, .7)] * 3
        assert server.counts()["requests"] == spent["calls"] == 9
    assert (spent["not_as_asked"], spent["from_cache"]) == (8, 1)


def test_a_reply_kept_under_another_parser_is_asked_for_anew(tmp_path):
    with serve() as server:
        ask, _ = chat(server.url, tmp_path / "c", model="seed")
        assert ask(user("a"), said, **PARAMS) == "seed 0"
        for _ in range(2):
            assert ask(user("a"), only("seed 1"), **PARAMS) == "seed 1"
        assert server.counts()["requests"] == 3  # seeds 0; 0 and 1; none


def test_the_key_is_all_that_matters(tmp_path):
    """And nothing more: the order of parameters, the process, the prices."""
    asked = [("echo", user("a"), {}), ("list", user("a"), {}), ("echo", user("b"), {}),
             ("echo", [{"role": "system", "content": "s"}, *user("a")], {})]
    asked += [("echo", user("a"), {name: value}) for name, value in [
        ("max_tokens", 49), ("temperature", 0.1), ("seed", 1), ("top_p", .9), ("top_k", 5),
        ("stop", ["x"])]]
    with serve() as server, serve() as other:
        for price in (0.0, 1.0):
            for model, messages, params in asked:
                ask, _ = chat(server.url, tmp_path / "c", model=model, price_in=price)
                params = [*(PARAMS | params).items()]
                ask(messages, said, **dict(params if price else reversed(params)))
        assert server.counts()["requests"] == server.counts()["distinct"] == len(asked)
        chat(other.url, tmp_path / "c")[0](user("a"), said, **PARAMS)
        assert other.counts()["requests"] == 1


def test_without_a_cache_a_run_pays_once_all_the_same():
    with serve() as server:
        ask, spent = chat(server.url, "")
        assert [ask(user("a"), said, **PARAMS) for _ in range(3)] == ["a"] * 3
        assert server.counts()["requests"] == 1 and spent["from_cache"] == 2


def test_the_same_question_from_16_threads_is_one_call(tmp_path):
    with serve(delay=.1) as server, ThreadPoolExecutor(16) as pool:
        ask, spent = chat(server.url, tmp_path / "c")
        jobs = [pool.submit(ask, user(f"q{i % 8}"), said, **PARAMS) for i in range(128)]
        assert [job.result() for job in jobs] == [f"q{i % 8}" for i in range(128)]
        counts = server.counts()
    assert counts["requests"] == counts["distinct"] == 8 and 1 < counts["most_at_once"] <= 8
    assert (spent["calls"], spent["from_cache"]) == (8, 120)


@pytest.mark.parametrize("thing", ["text", "folder", "nowhere"])
def test_no_cache_to_write_is_one_line(tmp_path, capsys, thing):
    path = tmp_path / ("c/c" if thing == "nowhere" else "c")
    if thing == "nowhere":
        path.parent.write_text("no folder")
    elif thing == "text":
        path.write_text("no SQLite file, but long enough to look like one. " * 50)
    elif thing == "folder":
        path.mkdir()
    with pytest.raises(SystemExit, match="2"):
        chat("http://127.0.0.1:9/v1", path)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err
    assert [p.name for p in tmp_path.rglob("*")] == ["c"]
    assert thing != "text" or path.read_text().startswith("no SQLite")


# ---------------------------------------------------------------------------------------------
# Parameters that a server does not take

@pytest.mark.parametrize("style", ["openai", "vllm", "fastapi"])
@pytest.mark.parametrize("threads", [1, 16])
def test_a_refusal_is_remembered(style, threads, capsys, monkeypatch):
    """One 400 a parameter; from 16 threads those that were on the way as well. The key is a letter
    of their names, to be hidden only where it is shown."""
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    refuses = ["max_tokens", "temperature", "top_k"]
    with serve(refuses={name: style for name in refuses}) as server:
        ask, spent = chat(server.url)
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(ask, user(f"q{i}"), said, top_k=5, **PARAMS) for i in range(60)]
            assert [job.result() for job in jobs] == [f"q{i}" for i in range(60)]
        counts, good = server.counts(), [r for r in server.seen() if r["outcome"] == "good"]
    for name in refuses:
        assert 1 <= counts[f"refused {name}"] <= threads
    assert len(good) == 60 == spent["calls"]
    for request in good:
        assert request["max_completion_tokens"] == 50 and request["seed"] == 0
        assert not set(refuses) & set(request)
    assert len(capsys.readouterr().err.splitlines()) == len(refuses)  # said once each


@pytest.mark.parametrize("kind, text", [
    ("context", "a"), ("context-vllm", "a"), ("quote", "The temperature is not known."),
    ("quote", "max_tokens is no longer supported; only the seed is.")])
def test_another_400_drops_no_parameter(kind, text):
    """Too long a prompt, or one that an error quotes, says nothing of the parameters."""
    with serve(script={text: [kind]}) as server:
        ask, _ = chat(server.url)
        with pytest.raises(ConnectionError):
            ask(user(text), said, top_k=5, **PARAMS)
        assert ask(user("b"), said, top_k=5, **PARAMS) == "b"
        last = server.seen()[-1]
    assert last["outcome"] == "good"
    assert {name: last.get(name) for name in (*PARAMS, "top_k")} == {**PARAMS, "top_k": 5}


# ---------------------------------------------------------------------------------------------
# Keys

def test_a_filtered_prompt_is_one_row(tmp_path):
    """Some servers say 403 to a prompt that they will not have: the others go on."""
    with serve(script={"row 3": ["403", "forever"]}) as server:
        for _ in range(2):
            done = subprocess.run(**stage(tmp_path, texts(8), "--base-url", server.url))
            assert done.returncode == 1, done.stderr
    assert len(read_rows(tmp_path / "out.jsonl")) == 7
    aside, = read_rows(tmp_path / "out.jsonl.failed")
    assert aside["text"] == "row 3." and "403" in aside["error"]


@pytest.mark.parametrize("kind", ["401", "404"])
def test_what_would_fail_for_all_is_one_line(tmp_path, kind):
    with serve(script={"": [kind, "forever"]}, delay=.1) as server:
        done = subprocess.run(**stage(tmp_path, texts(64), "--base-url", server.url,
                                      OPENAI_API_KEY=KEY))
        assert server.counts()["requests"] <= 32  # and the other calls are not tried
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert server.url in done.stderr and ERRORS[kind][:20] in done.stderr and KEY not in done.stderr
    assert kept(tmp_path / "replies.sqlite") == 0
    assert read_rows(tmp_path / "out.jsonl") == []
    assert not (tmp_path / "out.jsonl.failed").exists()


def test_no_key_is_needed_where_none_is_wanted(capsys):
    with serve() as server:
        assert chat(server.url)[0](user("a"), said, **PARAMS) == "a"
        assert server.counts()["authorized"] == 0
    with pytest.raises(SystemExit, match="2"):
        chat(None)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_key_is_sent_and_stays_nowhere(tmp_path, capfd, monkeypatch):
    """Although the server says it aloud in each error. Looked for while the cache is open."""
    rows = texts(8)
    script = {"row 4": ["400"], "row 1": ["500", "forever"], "row 2": ["429"], "row 3": ["quote"]}
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # as read from a file
    with serve(script=script, refuses={"top_k": "vllm"}) as server:
        ask, _ = chat(server.url, tmp_path / "c")
        args = SimpleNamespace(out=tmp_path / "out.jsonl", inp="rows.jsonl", limit=None,
                               overwrite=False, cache="c")
        with common.output(args, rows) as (done, write, fail):
            for row in rows:
                try:
                    write({**row, "reply": ask(user(row["text"]), said, top_k=5, **PARAMS)})
                except ConnectionError as error:
                    fail(row, error)
        assert server.counts()["authorized"] == server.counts()["requests"] > 8
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"c", "c-wal", "out.jsonl", "out.jsonl.failed", "out.jsonl.args.json"}
    assert len(read_rows(tmp_path / "out.jsonl.failed")) == 3
    found = capfd.readouterr()
    everything = found.out + found.err + "".join(
        path.read_bytes().decode("latin-1") for path in tmp_path.iterdir())
    assert "takes no top_k" in everything and "row 7." in everything
    assert KEY not in everything and KEY[3:] not in everything


# ---------------------------------------------------------------------------------------------
# Markup, dry run

MARKERS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>",
           "<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"]


def test_markup_closes_no_turn():
    plain = "a < b, x[i] | y <b>bold</b> <span> [Supported] [INSTEAD]"
    text = "".join(f"One{marker}two {marker}\n" for marker in MARKERS) + plain
    with serve() as server:
        ask, _ = chat(server.url)
        ask([{"role": "system", "content": text}, *user(text)], said, **PARAMS)
        arrived = [m["content"] for m in server.seen()[0]["messages"]]
    for content in arrived:
        assert [marker for marker in MARKERS if marker in content] == []
        assert content.endswith(plain)
        assert re.sub(r"\s", "", content) == re.sub(r"\s", "", text)  # nothing is lost


def test_dry_run_counts_and_does_nothing(tmp_path):
    """10 questions of 8 characters, 2 of them cached, and then 3 of them once more."""
    with serve() as server:
        paid, _ = chat(server.url, tmp_path / "c")
        for i in (0, 1):
            paid(user(f"row 000{i}"), said, **PARAMS)
        del paid
        gc.collect()  # closes the cache
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        ask, spent = chat(server.url, tmp_path / "c", dry_run=True, price_in=3.0, price_out=8.0)
        replies = [ask(user(f"row 000{i}"), said, "as it may be", **PARAMS)
                   for i in (*range(10), 0, 8, 9)]
        assert server.counts()["requests"] == 2
    assert replies == ["row 0000", "row 0001", *["as it may be"] * 8, "row 0000",
                       *["as it may be"] * 2]
    assert (spent["calls"], spent["from_cache"]) == (8, 5)
    assert (spent["tokens_in"], spent["tokens_out"]) == (8 * 8 / 4, 8 * 50)
    assert spent["cost"] == pytest.approx((16 * 3 + 400 * 8) / 1e6)
    del ask
    gc.collect()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_dry_run_needs_no_server_no_key_and_leaves_no_file(tmp_path):
    done = subprocess.run(**stage(tmp_path, texts(4), "--dry-run", "--price-out", "10"))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"stage.py", "rows.jsonl"}
    closing = dict(line.split() for line in done.stderr.splitlines() if re.search(r":\s", line))
    assert closing["calls:"] == "4" and closing["tokens_out:"] == "200"
    assert float(closing["cost:"]) == pytest.approx(.002)


# ---------------------------------------------------------------------------------------------
# All together, as processes

FAULTS = {"429": .08, "500": .08, "html": .02, "broken-json": .02}


def test_a_fifth_of_the_calls_fail_and_a_rerun_completes(tmp_path):
    rows = texts(300)
    never = {f"row {i}.": ["500"] * 6 for i in range(0, 300, 50)}  # for one run
    with serve(script=never, faults=FAULTS, seed=5) as server:
        run = stage(tmp_path, rows, "--base-url", server.url)
        first = subprocess.run(**run)
        assert first.returncode == 1, first.stderr
        done, failed = read_rows(tmp_path / "out.jsonl"), read_rows(tmp_path / "out.jsonl.failed")
        assert [row["text"] for row in failed] == [*never] and all("error" in r for r in failed)
        assert len(done) == 294 and all(row["reply"] == row["text"] for row in done)
        second = subprocess.run(**run)
        assert second.returncode == 0 and not (tmp_path / "out.jsonl.failed").exists()
        counts = server.counts()
    assert Counter(row["reply"] for row in read_rows(tmp_path / "out.jsonl")) == Counter(
        row["text"] for row in rows)
    assert counts["good"] == counts["distinct"] == 300 == kept(tmp_path / "replies.sqlite")
    assert sum(counts[kind] for kind in FAULTS) > 60


def test_killed_at_work_it_pays_only_for_what_is_missing(tmp_path):
    with serve(delay=.02) as server:
        run = stage(tmp_path, texts(200), "--base-url", server.url)
        process = subprocess.Popen(**run)
        while server.counts()["good"] < 60:
            time.sleep(.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert 60 <= server.counts()["good"] < 200
        assert subprocess.run(**run).returncode == 0
        counts = server.counts()
    assert [row["reply"] for row in read_rows(tmp_path / "out.jsonl")] == [
        row["text"] for row in texts(200)]
    assert counts["distinct"] == 200 <= counts["requests"] <= 200 + 16  # were on the way


def test_two_processes_share_a_cache(tmp_path):
    """Both start on a cache that is not there yet; a third run costs nothing."""
    rows = texts(200)
    with serve() as server:
        runs = [stage(tmp_path, rows, "--base-url", server.url, out=name) for name in "abc"]
        both = [subprocess.Popen(**run) for run in runs[:2]]
        ends = [(process.communicate(), process.returncode) for process in both]
        assert [code for _, code in ends] == [0, 0], ends
        paid = server.counts()["requests"]
        assert 200 <= paid <= 400 and server.counts()["distinct"] == 200
        assert subprocess.run(**runs[2]).returncode == 0 and server.counts()["requests"] == paid
    for name in "abc":
        assert [row["reply"] for row in read_rows(tmp_path / name)] == [r["text"] for r in rows]


# ---------------------------------------------------------------------------------------------

def throughput(calls=1000, delay=.5, concurrency=32, cache=""):
    """Prints the ideal time, calls * delay / concurrency, over the time that they took."""
    with serve(delay=delay) as server:
        ask, _ = chat(server.url, cache)
        started, busy = time.perf_counter(), time.process_time()
        with common.workers(concurrency) as pool:
            jobs = [pool.submit(ask, user(f"Is claim {i} so?"), said, **PARAMS)
                    for i in range(calls)]
            assert all(job.result() for job in jobs)
        took, busy = time.perf_counter() - started, time.process_time() - busy
        counts = server.counts()
    assert counts["distinct"] == counts["requests"] == calls
    print(f"{calls} calls of {delay} s, {concurrency} at once (at most {counts['most_at_once']} "
          f"were): {took:.2f} s, {calls * delay / concurrency / took:.3f} of ideal; the client's "
          f"CPU {1000 * busy / calls:.2f} ms a call, {threading.active_count()} threads at the end")


if __name__ == "__main__":
    throughput()
