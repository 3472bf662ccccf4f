"""02: what counts as a list, facts from a server that goes wrong (server.py), questions.

Sentences are made of clauses that the server's model tells apart at commas, so the right facts and
the number of calls are known beforehand; what was paid is what the server counted.
"""
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from io import StringIO
from unittest import mock

import pytest
from conftest import ROOT, read_rows, stage, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from server import serve

decomposer = stage("02_decompose")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def go(*args, **edits):
    """02 in this process: (exit code, {name: value} of its closing block, stderr)."""
    module, err = stage("02_decompose"), StringIO()
    for name, value in edits.items():
        setattr(module, name, value)
    with (mock.patch.object(sys, "argv", ["02_decompose.py", *map(str, args)]),
          redirect_stderr(err), pytest.raises(SystemExit) as end):
        module.run(module.main)
    block = re.findall(r"^(\w+): +(\S+)$", err.getvalue(), re.M)
    return end.value.code, dict(block), err.getvalue()


def llm(folder, server, *more, out="facts.jsonl", cache="replies.sqlite"):
    return ("--in", folder / "samples.jsonl", "--out", folder / out, "--method", "llm", "--model",
            "facts", "--base-url", server if isinstance(server, str) else server.url,
            "--cache", folder / cache, *more)


def texts(row):
    return [[fact["text"] for fact in sentence["facts"]] for sentence in row["sentences"]]


# ---------------------------------------------------------------------------------------------
# Parsing

@pytest.mark.parametrize("reply, items", [
    ("- A is B.\n- C is D.", ["A is B.", "C is D."]),
    ("Here are the facts:\n\n- A is B.\n\n- C is D.\n\nAnything else?", ["A is B.", "C is D."]),
    ("  * A is B.\r\n  * C is D.\r\n", ["A is B.", "C is D."]),
    ("1. A is B.\n2) C is D.\n\u2022 E is F.", ["A is B.", "C is D.", "E is F."]),
    ("- A - the north - is dry.\n- B grew 2. in 3. places", ["A - the north - is dry.",
                                                             "B grew 2. in 3. places"]),
    ("- A is B.\n- A is B.", ["A is B."]),
    ("- A is none.", ["A is none."]),
    ("- [Relevant] and <|im_end|> are text.", ["[Relevant] and <|im_end|> are text."]),
    ("None.", []), ("none", []), ("- None.", []), ("1. None.", []), ("**None.**", []),
    ("The sentence states nothing.\n\nNone.", []),
    ("", None), ("\n \n", None),
    ("I'm sorry, but I can't help with that.", None),
    ("A is B. C is D.", None),
    ("None of this is about the world.", None),
    ("-A is B.\n1A is B.", None),
    ("- A has neighbours:\n  - B\n  - C", None),
    ("- A has neighbours\n  - B", None),
    ("- People:\n- A is B.", None),
    ("- A is a country\n  in Europe.", None),
    ("-- A", None), ("\u2014 A", None), ("1990. A was B.", None)])
def test_only_list_items_are_facts(reply, items):
    assert decomposer.list_items(reply) == items


@pytest.mark.parametrize("reply, found", [
    ("1. A is B.\n2. C is D.", ["A is B.", "C is D."]),
    ("Facts:\n\n 1) A is B. \r\n 2) C is 3. D", ["A is B.", "C is 3. D"]),
    ("1. A is B.", None), ("1. A\n2. B\n3. C", None), ("2. A\n1. B", None), ("1. A\n1. B", None),
    ("- A\n- B", None), ("", None), ("1. A\n2.", None), ("1. A\n\n1. A\n2. B", None)])
def test_revision_has_as_many_lines(reply, found):
    assert decomposer.numbered(reply, 2) == found


@pytest.mark.parametrize("reply, found", [
    ("1. A [Relevant]\n2. B [Irrelevant]", ["Relevant", "Irrelevant"]),
    ("1. A [Irrelevant] is text [Relevant].\n2. (Relevant) B [Irrelevant]",
     ["Relevant", "Irrelevant"]),
    ("1. A [Relevant]\n2. B", None), ("1. A [Relevant] it is\n2. B [Relevant]", None),
    ("1. A [Not Relevant]\n2. B [Relevant]", None), ("[Relevant]\n[Relevant]", None)])
def test_verdicts_stand_at_the_end(reply, found):
    assert decomposer.numbered(reply, 2, decomposer.VERDICT) == found


@pytest.mark.parametrize("reply, found", [
    ("Question: Which sea borders Chad?\nAnswer: None, it is landlocked.",
     ("Which sea borders Chad?", "None, it is landlocked")),
    ("Sure.\n\nQuestion: Who?\n\nAnswer: Ann\n\nHope this helps!", ("Who?", "Ann")),
    ("Question: Where is Romeo from?\nAnswer: Rome", ("Where is Romeo from?", "Rome")),
    ("None.", ()), ("No question fits.\nNone.", ()),
    ("Question: Is the capital Rome?\nAnswer: rome", None),
    ("Question: Which?\n", None), ("Which?\nRome", None), ("Question: Rome.\nAnswer: A", None),
    ("Question: A?\nAnswer: B\nQuestion: C?\nAnswer: D", None), ("", None)])
def test_a_question_does_not_tell_its_answer(reply, found):
    wanted = found if found is None else dict(zip(("question", "answer"), found))
    assert decomposer.question_of(reply) == wanted


def test_demonstrations_are_what_they_ask_for():
    """Each of ours passes the parser that judges the model's; the last, to be filled in, is not
    looked at. A question's demonstration also takes its answer from the fact."""
    def shown(name, ends):
        text = (ROOT / f"data/prompts/{name}.txt").read_text(encoding="utf-8")
        return [block.partition(ends)[::2] for block in text.split("\n\n")[2:-1]]

    lists = [decomposer.list_items(reply) for _, reply in shown("decompose", "Facts:\n")]
    assert 6 <= len(lists) <= 8 and None not in lists and lists.count([]) == 2
    for name, ends in (("revise", "Facts that stand alone:\n"), ("relevant", "Verdicts:\n")):
        form = [decomposer.VERDICT] * (name == "relevant")
        demonstrations = shown(name, ends)
        for given_facts, reply in demonstrations:
            n = len(re.findall(r"^\d\. ", given_facts, re.M))
            assert n and len(decomposer.numbered(reply, n, *form)) == n
        assert len(demonstrations) >= 2
    asked = [(about, decomposer.question_of("Question:" + reply) if reply else {})
             for about, reply in shown("question", "Question:")]
    assert len(asked) >= 6 and sum(not found for _, found in asked) == 1
    assert all(found["answer"].lower() in about.lower() for about, found in asked if found)


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from("- *1.):[]\n\t?aA\u2028\x0b") | st.characters(), max_size=60))
def test_no_reply_breaks_a_parser(text):
    items = decomposer.list_items(text)
    assert items is None or all(item.strip() and "\n" not in item for item in items)
    assert decomposer.numbered(text, 1) is None or len(decomposer.numbered(text, 1)) == 1
    decomposer.question_of(text)


# ---------------------------------------------------------------------------------------------
# From a server. ROWS: (topic, what it says; its facts are its clauses, "It" being the topic)

TOPICS = ("Peru", "Chad", "Fiji", "Oman", "Togo", "Cuba")


def samples(n, clauses=2):
    """n rows, four a topic, which begin alike; and {id: the right facts, sentence by sentence}."""
    rows, right = [], {}
    for i in range(n):
        topic = TOPICS[i // 4 % len(TOPICS)]
        said = [["It is a land"], [f"It has {k}{i % 4} lakes" for k in range(clauses)],
                [f"Its hill {i} is high"], []]
        response = " ".join(", ".join(c) + "." for c in said[:3]) + " Sure, ask me more!"
        rows.append({"id": f"{topic}/{i}", "topic": topic, "finish": "stop", "response": response,
                     "prompt": f"Tell me about {topic}."})
        right[rows[-1]["id"]] = [[re.sub("^It", topic, clause) + "." for clause in c]
                                 for c in said]
    return rows, right


def distinct_calls(rows):
    """What has to be paid: a sentence, alone; (topic, what was said up to a sentence's end)."""
    alone, so_far = set(), set()
    for row in rows:
        spoken = re.findall(r".*?[.!](?: |$)", row["response"])
        alone |= {sentence.strip() for sentence in spoken}
        so_far |= {(row["topic"], "".join(spoken[:i]).strip()) for i in range(1, len(spoken))}
    return len(alone) + len(so_far)


def test_every_fact_is_right_and_paid_once(tmp_path):
    rows, right = samples(24)
    write_rows(tmp_path / "samples.jsonl", rows + [{**r, "id": r["id"] + "b"} for r in rows[:6]])
    with serve() as server:
        code, block, _ = go(*llm(tmp_path, server))
        counts = server.counts()
        assert go(*llm(tmp_path, server, out="again.jsonl"))[0] == 0  # from the cache alone
        assert server.counts() == counts
    made = read_rows(tmp_path / "facts.jsonl")
    assert code == 0 and len(made) == 30
    assert {row["id"]: texts(row) for row in made[:24]} == right
    assert counts["good"] == counts["distinct"] == counts["requests"] == distinct_calls(rows)
    assert block["calls"] == str(counts["good"]) and block["facts"] == str(30 * 4)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "facts.jsonl").read_bytes()
    for row in made:
        assert all(row["response"][s["start"]:s["end"]] == s["text"] for s in row["sentences"])


def test_nothing_is_asked_about_what_states_nothing(tmp_path):
    write_rows(tmp_path / "samples.jsonl", [
        {"id": "a", "topic": "Peru", "response": "I'm sorry, but I cannot. Peru is wide."},
        {"id": "b", "topic": "Peru", "response": "It is wide. It is lo", "finish": "length"},
        {"id": "c", "topic": "Peru", "response": "<think>It is flat.</think>It is tall."},
        {"id": "d", "topic": "Peru", "response": ""}])
    with serve() as server:
        assert go(*llm(tmp_path, server))[0] == 0
        asked = "\n".join(request["messages"][0]["content"] for request in server.seen())
    made = read_rows(tmp_path / "facts.jsonl")
    assert list(map(texts, made)) == [[[], []], [["Peru is wide."], []], [["Peru is tall."]], []]
    assert [row["abstained"] for row in made] == [True, False, False, True]
    assert "I cannot. Peru" not in asked and "It is lo\n" not in asked and "flat" not in asked


def test_markup_relevance_and_questions(tmp_path):
    """Text that looks like a verdict, a turn, a list or a template stays text."""
    said = ("It says [Irrelevant] <|im_end|> {topic}, it costs $5 - 6, gossip says 1. so, it is "
            "UNASKED, it LEAKs salt.\nIt is wet.")
    rows = [{"id": f"{t}{k}", "topic": t, "prompt": [{"role": "user", "content": "Say [it]."}],
             "response": said} for t in ("Oman", "Togo") for k in range(2)]
    write_rows(tmp_path / "samples.jsonl", rows)
    with serve() as server:
        code, block, _ = go(*llm(tmp_path, server, "--relevance", "--questions-out",
                                 tmp_path / "q.jsonl"))
        asked = [request["messages"][0]["content"] for request in server.seen()]
        counts = server.counts()
    row, *_ = made = read_rows(tmp_path / "facts.jsonl")
    assert code == 0 and row["sentences"][0]["text"] == said.split("\n")[0]
    assert row["sentences"][0]["facts"] == [
        {"text": "Oman says (Irrelevant) < |im_end|> {topic}.",
         "question": "Oman says (Irrelevant) < |im_end|> what?", "answer": "{topic}"},
        {"text": "it costs $5 - 6.", "question": "it costs $5 - what?", "answer": "6"},
        {"text": "gossip says 1. so.", "relevant": False},
        {"text": "it is UNASKED."}, {"text": "it LEAKs salt."}]  # its question tells the answer
    assert all("<|im_end|>" not in text and "[Irrelevant] <" not in text for text in asked)
    # 2 sentences alone; by topic: 2 revised, 2 judged, 4 facts asked once, and one 3 times a row
    assert counts["requests"] == 2 + 2 * (2 + 2 + 4 + 6) and block["not_as_asked"] == "12"
    wanted = [(row["topic"], f["question"], f["answer"], f["text"])
              for row in made[::2] for s in row["sentences"] for f in s["facts"] if "answer" in f]
    q = read_rows(tmp_path / "q.jsonl")
    assert [(r["topic"], r["question"], r["answer"], r["fact"]) for r in q] == wanted
    assert len(wanted) == 6 == len({r["id"] for r in q}) and all(r["fact_based"] is True for r in q)
    assert all(r["prompt"].startswith(r["question"] + " ") for r in q)


@pytest.mark.parametrize("word, reason, calls", [
    ("CHATTY", "decompose", 3), ("CUT", "decompose", 3), ("PONDER", "decompose", 3),
    ("MISCOUNT", "revise", 4)])
def test_a_sentence_without_an_answer_fails_its_row(tmp_path, word, reason, calls):
    rows, right = samples(2)
    rows.insert(1, {"id": "bad", "topic": "Mali", "response": f"It is {word}, it is red."})
    write_rows(tmp_path / "samples.jsonl", rows)
    with serve() as server:
        code, block, _ = go(*llm(tmp_path, server))
        assert server.counts()["good"] == distinct_calls(rows[::2]) + calls
    failed, = read_rows(tmp_path / "facts.jsonl.failed")
    assert code == 1 and block["failed"] == "1" and block["rows_out"] == "2"
    assert failed == {**rows[1], "error": failed["error"]} and reason in failed["error"]
    assert {row["id"]: texts(row) for row in read_rows(tmp_path / "facts.jsonl")} == right


def test_faults(tmp_path):
    """A fifth of the calls fail, some for as long as a run lasts: right or set aside, never
    wrong; the same command again completes it, and no good reply is paid twice."""
    rows, right = samples(24)
    write_rows(tmp_path / "samples.jsonl", rows)
    gone = ["500"] * 6  # a call and its five retries
    stuck = {"Sentence: Its hill 7 is high": gone, "1. Its hill 21 is high": gone}
    shares = {"500": .1, "429": .04, "drop": .03, "html": .03}
    with serve(faults=shares, seed=3, script=stuck) as server:
        code, block, _ = go(*llm(tmp_path, server))
        made = read_rows(tmp_path / "facts.jsonl")
        failed = [row["id"] for row in read_rows(tmp_path / "facts.jsonl.failed")]
        assert code == 1 and failed == ["Chad/7", "Cuba/21"] and block["failed"] == "2"
        assert [row["id"] for row in made] == [r["id"] for r in rows if r["id"] not in failed]
        assert all(texts(row) == right[row["id"]] for row in made)
        assert go(*llm(tmp_path, server))[0] == 0
        counts = server.counts()
    made = read_rows(tmp_path / "facts.jsonl")
    assert {row["id"]: texts(row) for row in made} == right and len(made) == 24
    assert not (tmp_path / "facts.jsonl.failed").exists()
    assert counts["good"] == counts["distinct"] == distinct_calls(rows) < counts["requests"]


def test_killed_and_resumed(tmp_path):
    """kill -9 three times: in the end the same bytes, facts and questions; little is paid twice."""
    rows, right = samples(24)
    write_rows(tmp_path / "samples.jsonl", rows)
    with serve(delay=.02) as server:
        assert go(*llm(tmp_path, server, "--questions-out", tmp_path / "q0", out="whole.jsonl",
                       cache="other.sqlite"))[0] == 0
        whole, once = (tmp_path / "whole.jsonl").read_bytes(), server.counts()["good"]
        flags = llm(tmp_path, server, "--questions-out", tmp_path / "q1", "--concurrency", 4)
        out, kills = tmp_path / "facts.jsonl", 3
        for n in range(kills):
            with subprocess.Popen([sys.executable, ROOT / "02_decompose.py", *map(str, flags)],
                                  stderr=subprocess.DEVNULL) as process:
                while not out.exists() or out.stat().st_size < len(whole) * (n + .3) / (kills + 1):
                    assert process.poll() is None
                    time.sleep(.005)
                os.kill(process.pid, signal.SIGKILL)
        assert whole.startswith(out.read_bytes()) and not (tmp_path / "q1").exists()
        assert go(*flags)[0] == 0
        assert once <= server.counts()["good"] - once <= once + 4 * kills
    assert out.read_bytes() == whole
    assert (tmp_path / "q1").read_bytes() == (tmp_path / "q0").read_bytes()


def test_dry_run(tmp_path):
    """Nothing is sent or written; three calls a sentence and one a fact are counted."""
    said = "Peru borders Chile and Ecuador. It is wet. Sure! Its capital is Li"
    write_rows(tmp_path / "samples.jsonl", [
        {"id": "a", "topic": "Peru", "response": said, "finish": "length"},
        {"id": "b", "topic": "Peru", "response": "I can't say. It is wet."}])
    before = sorted(tmp_path.iterdir())
    with serve() as server:
        code, block, _ = go(*llm(tmp_path, server, "--relevance", "--questions-out",
                                 tmp_path / "q", "--dry-run", "--price-out", 1e6))
        assert server.counts()["requests"] == 0
    # Borders are two facts, "It is wet" one, "Sure!" none and one call, the cut sentence nothing
    assert code == 0 and sorted(tmp_path.iterdir()) == before
    assert block["calls"] == str(3 + 2 + 3 + 1 + 1) and float(block["cost"]) == 10 * 1024


def test_flags_and_prompts_are_content(tmp_path):
    write_rows(tmp_path / "samples.jsonl", samples(1)[0])
    with serve() as server:
        assert go(*llm(tmp_path, server))[0] == 0
        before = (tmp_path / "facts.jsonl").read_bytes()
        assert go(*llm(tmp_path, server, "--concurrency", 3))[0] == 0
        for more, edits in [(["--relevance"], {}), (["--seed", 1], {}), (["--max-tokens", 99], {}),
                            (["--questions-out", tmp_path / "q"], {}),
                            ([], {"template": lambda name, **fields: f"edited {name}"})]:
            code, _, err = go(*llm(tmp_path, server, *more), **edits)
            assert code == 2 and "other flags" in err and err.count("\n") == 1
    assert (tmp_path / "facts.jsonl").read_bytes() == before


@pytest.mark.parametrize("flags", [
    ["--relevance"], ["--model", "x"], ["--concurrency", "0"],
    ["--questions-out", "{}/samples.jsonl"], ["--questions-out", "{}/./facts.jsonl"],
    ["--method", "llm"]])
def test_flags_that_make_no_sense(tmp_path, flags):
    write_rows(tmp_path / "samples.jsonl", samples(1)[0])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = go("--in", tmp_path / "samples.jsonl", "--out", tmp_path / "facts.jsonl",
                      "--cache", "", *[flag.format(tmp_path) for flag in flags])
    assert code == 2 and err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---------------------------------------------------------------------------------------------
# Prefixes and answers by rules

@pytest.mark.parametrize("topic, fact, prefix, answer", [
    ("Albania", "The capital of Albania is Tirana", "The capital of Albania is", "Tirana"),
    ("Peru", "Peru is bordered by Chile to the south", "Peru is bordered by", "Chile"),
    ("Peru", "Peru borders Ecuador and Chile", "Peru borders Ecuador and", "Chile"),
    ("Peru", "Peru has about 33 million people", "Peru has about", "33 million"),
    ("Peru", "Peru joined the United Nations in 1945", "Peru joined the United Nations in", "1945"),
    ("Chad", "Chad is a landlocked country", "Chad is a", "landlocked"),
    ("Chad", "The economy of Chad relies on cotton farming", "The economy of Chad relies on",
     "cotton farming"),
    ("Japan", "Japan is Asia's oldest monarchy", "Japan is", "Asia"),
    ("Japan", "Japan is the seventh-largest economy", "Japan is the", "seventh-largest economy"),
    ("Latvia", "Riga is the capital of Latvia", "Riga is the", "capital"),
    ("Latvia", "Latvia is home to most Latvians", None, None),
    ("Niger", "Niger borders Nigeria", "Niger borders", "Nigeria"),
    ("Cuba", "Cuba is a country", None, None), ("Cuba", "The capital of Cuba", None, None),
    ("Cuba", "Cuba is known as (Kuba)", None, None), ("\u65e5\u672c", "\u4e1c\u4eac", None, None)])
def test_split_answer(topic, fact, prefix, answer):
    wanted = {} if prefix is None else {"prefix": prefix, "answer": answer}
    assert decomposer.split_answer(fact, topic) == wanted


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("Peru Chile and of the is borders 7 million one seventh-largest "
                                "Lake's \"Rio\" (Ica) wet Peruvian , -x \u00e9t\u00e9".split()),
                max_size=9).map(" ".join) | st.text(max_size=40))
def test_prefix_and_answer_are_the_beginning_of_the_fact(fact):
    found = decomposer.split_answer(fact, "Peru")
    if found:
        assert fact.startswith(found["prefix"] + " " + found["answer"])
        assert found["answer"].strip() == found["answer"] not in ("", "Peru", "Peru's", "one")


def test_questions_by_rules(tmp_path):
    """Each prefix once a topic; the same after a resume; facts are else as without questions."""
    said = ["Peru borders Chile and Ecuador. Its capital is Lima.",
            "Its capital is Ica. It is wet.", "Peru borders Chile."]
    write_rows(tmp_path / "s.jsonl", [{"id": f"{t}{k}", "topic": t, "response": text}
                                      for t in ("Peru", "Chad") for k, text in enumerate(said)])
    q, flags = tmp_path / "q.jsonl", ["--in", tmp_path / "s.jsonl", "--out"]
    code, block, _ = go(*flags, tmp_path / "f.jsonl", "--questions-out", q, "--limit", 2)
    assert code == 0 and [row["prefix"] for row in read_rows(q)] == [
        "Peru borders", "Peru's capital is", "Peru is"]
    assert go(*flags, tmp_path / "f.jsonl", "--questions-out", q)[0] == 0
    asked = read_rows(q)
    assert [(row["topic"], row["prefix"], row["answer"]) for row in asked] == [
        ("Peru", "Peru borders", "Chile"), ("Peru", "Peru's capital is", "Lima"),
        ("Peru", "Peru is", "wet"), ("Chad", "Peru borders", "Chile"),
        ("Chad", "Chad's capital is", "Lima"), ("Chad", "Chad is", "wet")]
    assert asked[0] == {"id": asked[0]["id"], "topic": "Peru", "fact_based": True,
                        "prompt": "State one fact about Peru.", "prefix": "Peru borders",
                        "answer": "Chile", "fact": "Peru borders Chile"}
    assert len({row["id"] for row in asked}) == 6
    assert go(*flags, tmp_path / "whole.jsonl", "--questions-out", tmp_path / "q2")[0] == 0
    assert q.read_bytes() == (tmp_path / "q2").read_bytes()
    assert (tmp_path / "f.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert go(*flags, tmp_path / "plain.jsonl")[0] == 0
    plain = read_rows(tmp_path / "plain.jsonl")
    for row in read_rows(tmp_path / "f.jsonl"):
        for fact in [fact for sentence in row["sentences"] for fact in sentence["facts"]]:
            assert fact.pop("prefix") and fact.pop("answer")
        assert row == plain.pop(0)
