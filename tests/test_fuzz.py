"""Every reader of every stage, given files that no stage wrote: read whole, or refused in one line.

    NANOFACT_FUZZ=2000 python -m pytest -q -rP tests/test_fuzz.py     # the long form; else 50 cases

A case is a good file with a few faults in its rows (other types, missing keys, half characters,
endless numbers, markup) and in its lines (BOM, CRLF, null bytes, torn ends, keys twice). What must
hold is said once, in `play` and the `kept` functions. Stages run in this process, from their first
line to their last; a model and a server are played by stand-ins that answer at once.
"""
import copy
import io
import json
import math
import os
import re
import shlex
import shutil
import sqlite3
import sys
import time
from collections import Counter
from contextlib import closing, redirect_stderr, suppress
from functools import partial
from types import SimpleNamespace
from unittest import mock

import common
import pytest
import torch
from common import as_messages, load_model
from conftest import call, read_rows, stage, write_rows
from data import corpus
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_reliability import here, snapshot

CASES = int(os.environ.get("NANOFACT_FUZZ", 50))
HANG = 100  # seconds, for a reader that has a hundredth of a core


# ---------------------------------------------------------------------------------------------
# Good files. A row of 03 has all that any stage reads

def verified(topic, k):
    """A response with two sentences, the second of which is right in one of two responses."""
    capital, slug = ("Suva", "Nadi")[k], topic.lower()
    parts, at = (f"{topic} is an island state.", f"Its capital is {capital}."), 0
    row = {"id": f"{slug}/{k}", "prompt_id": slug, "topic": topic, "fact_based": True,
           "prompt": f"Tell me of {topic}.", "response": " ".join(parts), "finish": "stop",
           "abstained": False, "rating": 5.0 - k, "check": "Suva", "reference": "Suva",
           "category": "facts", "gen": {"temperature": 0.0}, "sentences": []}
    for n, part in enumerate(parts):
        fact = {"text": part.replace("Its", f"{topic}'s").rstrip("."), "kind": "capital",
                "label": "NS" if n == k == 1 else "S", "human": "S", "answer": capital,
                "question": f"What is {topic}'s capital?", "relevant": True,
                "evidence": [{"title": topic, "field": "Capital", "text": "name: Suva"}],
                "conf": {"max": 0.75 - k / 4, "exp": 0.6, "neg_ent": -0.5}, "r": 0.5,
                "answers": [{"text": "Suva", "label": "S", "count": 2},
                            {"text": "Nadi", "label": "NS", "count": 1}], "known": "potentially"}
        row["sentences"].append({"text": part, "start": at, "end": at + len(part),
                                 "facts": [fact]})
        at += len(part) + 1
    return row


def said(role, text):
    return [{"role": role, "content": text}]


def where(n):
    name = str(n)
    return {"id": name, "prompt_id": name, "kind": "fact", "prompt": said("user", f"Where {n}?")}


def held(rows):
    """The same about other prompts."""
    return [{**row, "prompt_id": f"held {row['id']}"} for row in rows]


ROWS = [verified(topic, k) for topic in ("Fiji", "Tonga") for k in (0, 1)]
ASKED = [{"id": f"q/{k}", "prompt_id": "q", "topic": "Fiji", "prompt": "What is Fiji's capital?",
          "question": "What is Fiji's capital?", "response": word, "finish": "stop"}
         for k, word in enumerate(("Suva", "Nadi"))]
PAIRS = [{**where(n), "chosen": said("assistant", "It is an isle."), "prefix": "It is",
          "rejected": said("assistant", "It is no isle."), "score_chosen": 1.0,
          "finish": {"chosen": "stop", "rejected": "length"}} for n in range(3)]
SINGLES = [{**where(n), "label": n % 2 == 0,
            "completion": said("assistant", "It is an isle. It is here."), "completion_sentences": [
                "It is an isle.", "It is here."], "sentence_label": [True, False],
            "sentence_spans": [[0, 14], [15, 26]], "finish": "stop"} for n in range(4)]
GOOD = {
    "rows": ROWS, "others": ROWS, "asked": ASKED, "pairs": PAIRS, "singles": SINGLES,
    "held_pairs": held(PAIRS), "held_singles": held(SINGLES),
    "prompts": [
        {"id": "fiji-geo", "topic": "Fiji", "prompt": "Tell me of Fiji.", "domain": "country"},
        {"id": "b", "prompt": said("system", "Be brief.") + said("user", "And Tonga?"),
         "topic": "Tonga", "fact_based": True, "prefix": "Tonga is"}],
    "given": [{"id": f"g{k}", "prompt": f"Say {k}.", "response": f"It is {k}.", "topic": "k",
               "fact_based": k == 0} for k in (0, 1)],
    "elsewhere": [{"id": "nauru", "topic": "Nauru", "prompt": "Tell me of Nauru."}],
    "general": [{"id": "r", "prompt": "Say a.", "response": "a", "rating": 5.0, "finish": "stop"},
                {"id": "p", "prompt": "Say b.", "chosen": said("user", "Say b.")
                 + said("assistant", "b"), "rejected": said("assistant", "c")},
                {"id": "k", "prompt": said("user", "Say d."), "label": False,
                 "completion": said("assistant", "e")}],
    "pages": [{"title": topic, "field": "Capital", "text": "name: Suva"}
              for topic in ("Fiji", "Tonga", "C\u00f4te d'Ivoire")],
    "sources": [{"title": "Fiji", "text": ["It is.", "It was."], "field": "Past"},
                {"title": "Tonga", "text": [{"text": "Here."}]}, {"title": "Fiji", "text": "No."}],
    "qa": [{"id": f"{n}", "topic": "Fiji", "prompt": "Why?", "response": "There is no such thing.",
            **more} for n, more in enumerate((
                {"label": 1, "check": "no"}, {"label": 0}, {"unknown": True},
                {"unknown": False, "answer": ["Suva", "suva"]}))],
    "human": [{"topic": "Fiji", "input": "Tell me.", "output": "It is an isle.", "annotations": [
        {"text": "It is an isle.", "is-relevant": True, "model-atomic-facts": [],
         "human-atomic-facts": [{"text": "It is.", "label": label}]}]} for label in ("S", "IR")],
    "log": [{"step": n, "epoch": 0.5, "loss": 0.69, "rewards/margins": 0.1 * n, "eval_loss": 0.7}
            for n in range(3)]}
KEYS = sorted({key for rows in GOOD.values() for row in rows for key in row}
              | {"output", "prefix", "repeats", "error", "shown", "sort", "facts", "content",
                 "annotations", "sentence_id", "score", "from", "t", "constructor"})


# ---------------------------------------------------------------------------------------------
# Faults

def nested(n):
    return json.loads("[" * n + "]" * n)


NASTY = [None, True, False, 0, -1, 1, 7, 2 ** 63, 10 ** 400, -0.0, 0.5, 1e308, math.nan, math.inf,
         "", " ", "\0", "a\0b", "\ufeff", "\u2028", "a\x85b\x1cc", "\ud83d", "\U0001f600", "\r\n",
         "<|im_end|>", "<|im_start|>system\nx", "<think>x", "</think>", "<b>x</b></script>", "\"'`",
         "../../x", "C:\\x\\", "a/b", "{0}", "%s %(x)s", "\\1(?P<", "(", "a{99999999999}",
         "(" * 3000 + ")" * 3000, "[[A]] [Supported]", "S", "NS", "IR", "stop", "length", "user",
         "NaN", "x " * 300, [], {}, [[]], [{}], [None], [0, 1], {"": ""}, {"text": "x"},
         {"role": "user", "content": "x"}, nested(60), nested(900)]
BYTES = [b"\0", b"\xff", b"\xed\xa0\x80", b"\r", b"\n", b"\xe2\x80\xa8", b"\x85", b"1e999", b"NaN",
         b"[" * 3000, b"9" * 5000, b",", b'"', b"}", b"{", b"\\ud800", b"\\u0000", b" \n\n"]
NUMBERS = [b"1e999", b"-1e999", b"NaN", b"1E2", b"1" * 400, b"01", b"-0.0"]


def slots(value):
    """(container, key) of all that a row holds, at any depth."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)) and value[key]:
            yield from slots(value[key])


ANY = st.integers(0, 2 ** 20)  # of a list; a strategy made anew for each list would cost more
FEW, FEWER = st.sampled_from((1, 1, 2, 3, 0)), st.sampled_from((0, 0, 0, 0, 1, 2))
ROW_FAULTS = st.sampled_from(("set", "set", "set", "drop", "wrap", "add", "swap"))
LINE_FAULTS = st.sampled_from(("bytes", "blank", "twice", "cut", "keys", "other", "number"))
FRAMES = st.sampled_from([(b"", b"\n", b"\n")] * 8 + [
    (b"\xef\xbb\xbf", b"\n", b"\n"), (b"", b"\r\n", b"\r\n"), (b"", b"\n", b""),
    (b"\n\n", b"\n\n", b"\n"), (b"", b"\r", b"\r")])
NASTY_JSON = [*map(json.dumps, NASTY)]  # read anew, each is a value of its own


@st.composite
def faulty(draw, text):
    """The bytes of a file that was made from good rows, a JSON list."""
    rows = json.loads(text)

    def one(items):
        return items[draw(ANY) % len(items)]

    for _ in range(draw(FEW)):
        row = one(rows)
        if not row:
            break
        place, key = one(list(slots(row)))
        how, fault = draw(ROW_FAULTS), json.loads(one(NASTY_JSON))
        if how == "drop":
            place.pop(key)
        elif how == "wrap":
            place[key] = [place[key]]
        elif how == "add":
            (place if isinstance(place, dict) else row)[one(KEYS)] = fault
        elif how == "swap":
            there, name = one(list(slots(row)))
            place[key] = copy.deepcopy(there[name])
        else:
            place[key] = fault
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
             for row in rows]
    for _ in range(draw(FEWER)):
        n, how = draw(ANY) % len(lines), draw(LINE_FAULTS)
        if how == "bytes":
            at = draw(ANY) % (len(lines[n]) + 1)
            lines[n] = lines[n][:at] + one(BYTES) + lines[n][at:]
        elif how == "keys":
            lines[n] = lines[n].replace(b"{", b'{"' + one(KEYS).encode() + b'": "first", ', 1)
        elif how == "number":
            lines[n] = re.sub(rb"(: )-?\d+(\.\d+)?", rb"\g<1>" + one(NUMBERS), lines[n], count=1)
        elif how == "cut":
            lines[n] = lines[n][:draw(ANY) % (len(lines[n]) + 1)]
        else:
            lines.insert(n, {"blank": b" \t", "twice": lines[n], "other": b"[1]"}[how])
    head, ending, last = draw(FRAMES)
    return head + ending.join(lines) + last


# ---------------------------------------------------------------------------------------------
# What a good reader makes of a file, found without one

def once(pairs):
    if len(dict(pairs)) < len(pairs):
        raise Lost("a key that comes twice")
    return dict(pairs)


def number(text):
    if math.isinf(float(text)):
        raise Lost("a number that no float holds")
    return float(text)


class Lost(Exception):
    """What a reader may refuse and must not take, because a part of it goes."""


def text_of(data):
    try:
        return data.decode("utf-8-sig")  # a byte order mark is no part of a text
    except UnicodeDecodeError:
        raise Lost("bytes that are no UTF-8") from None


LINE_ENDS = "\r\n|\r|\n"


def meant(data, stem, ends=LINE_ENDS):
    """The rows that the bytes of a file hold. Raises Lost."""
    lines = re.split(ends, text_of(data))
    rows = [{**json.loads(line, object_pairs_hook=once, parse_float=number), "#": n}
            for n, line in enumerate(lines, 1) if line.strip()]
    for row in rows:
        if "output" in row and "response" not in row:
            row["response"] = row.pop("output")
        row.setdefault("id", f"{stem}-{row.pop('#')}")
        row.pop("#", None)
    return rows


def same(a, b, made):
    """Is all of row a in row b, as it was, but for what the stage makes?"""
    return [key for key in a if key not in made
            and (key not in b or json.dumps(a[key]) != json.dumps(b[key]))]


def numbers(err):
    """The closing block of a stage."""
    return dict(re.findall(r"(?m)^ *([\w-]+): +(\S.*)$", err.rpartition("---\n")[2]))


def plain_json(text):
    """JSON as the rest of the world has it: without NaN."""
    def refuse(word):
        raise AssertionError(f"{word} is no JSON: {text[:300]}")
    return json.loads(text, parse_constant=refuse)


MADE = {"01": {"id", "prompt_id", "response", "finish", "gen", "reasoning", "fact_based"},
        "02": {"sentences", "abstained"}, "03": {"sentences", "rating"}}
JUDGED = {"label", "kind", "evidence", "score", "conf", "answers", "r", "known", "repeats"}


def kept_rows(case):
    """01, 02, 03: rows in (times n) are rows out and failed, each with all that it had."""
    made, failed = MADE[case.script[:2]], case.out.with_name("out.jsonl.failed")
    out = read_rows(case.out) + (read_rows(failed) if failed.exists() else [])
    rows = case.rows
    if "--n" in case.flags:
        rows = [{**row, "id": f"{row['id']}/{k}"} for row in rows for k in range(2)]
    found = {row["id"]: row for row in out}
    assert len(out) == len(found) and sorted(found) == sorted(row["id"] for row in rows)
    for row in rows:
        assert not same(row, found[row["id"]], made), "a field was changed"
        if case.script == "03_verify" and "rate" not in case.flags:
            for a, b in zip(row["sentences"], found[row["id"]]["sentences"], strict=True):
                assert not same(a, b, {"facts"}), "a sentence was changed"
                for x, y in zip(a["facts"], b["facts"], strict=True):
                    assert not same(x, y, JUDGED), "a fact was changed"


def kept_topics(case):
    """01 --topics: each line that has one is a topic, as it stands there."""
    lines = [line.strip() for line in re.split(LINE_ENDS, text_of(case.data))]
    rows = read_rows(case.out)  # one: the stand-in always writes the same prompt
    assert int(numbers(case.err)["rows_in"]) == len([*filter(None, lines)]), "other topics"
    assert [row["domain"] for row in rows] == [*filter(None, lines)][:1], "other topics"


def kept_evidence(case):
    """03: what is shown as evidence is a passage of the corpus, as it is there."""
    there = [{key: row[key] for key in ("title", "field", "text") if key in row}
             for row in case.rows]
    for row in read_rows(case.out):
        for fact in [fact for sentence in row["sentences"] for fact in sentence["facts"]]:
            for found in fact["evidence"]:
                assert {key: found[key] for key in found if key != "found"} in there


def kept_groups(case):
    """04: each prompt and each response is counted; what is trained on is a part of a response."""
    told, rows = numbers(case.err), case.rows if case.fuzzed == "rows" else ROWS
    assert int(told["prompts_in"]) == len({row["prompt_id"] for row in rows})
    assert int(told["responses_in"]) == len(rows)
    for row in read_rows(case.out):
        plain_json(json.dumps(row))
        assert train.lacks(row, case.loss) is None, f"05 refuses {row}"
        if row["kind"] in ("fact", "if") and case.fuzzed == "rows" and "--given" not in case.flags:
            for side in {"chosen", "rejected", "completion"} & row.keys():
                assert any(row[side][0]["content"] in of["response"] for of in rows)


def kept_training(case):
    """05: each row is trained on or left out; a completion's tokens are its text."""
    told = numbers(case.err)
    rows = case.rows if not case.fuzzed.startswith("held") else GOOD[case.fuzzed[5:]]
    assert int(told["rows_in"]) == len(rows) == int(told["trained_on"]) + int(told["left_out"])


def kept_json(case):
    """06: what is printed is JSON as a browser reads it; score counts all rows."""
    assert plain_json(case.said).get("n_responses", len(case.rows)) == len(case.rows)


def kept_comparison(case):
    plain_json(case.out.read_text(encoding="utf-8"))
    page = case.out.with_name("page.html").read_text(encoding="utf-8")
    plain_json(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])


def kept_picture(case):
    assert int(numbers(case.err)["rows"]) == len(case.rows)


def kept_corpus(case):
    """prepare.py: each word of each text stands on the page of its title."""
    c = corpus.open_corpus(case.new)
    for row in case.rows:
        there = " ".join(p["text"] for p in corpus.passages_of(c, row["title"])).split()
        texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
        for text in texts:
            text = text["text"] if isinstance(text, dict) else text
            assert Counter(text.split()) <= Counter(there)


def kept(case):
    """Other files: the run went through."""


# ---------------------------------------------------------------------------------------------
# Readers, and what plays the model and the server

train = stage("05_train")
TINY = {}


@pytest.fixture(scope="module", autouse=True)
def tiny(tiny_model):
    model, tokenizer, _ = load_model(str(tiny_model), dtype="float32", device="cpu")
    tokenizer.save_pretrained = model.save_pretrained = lambda folder: None
    TINY.update(model=model, tokenizer=tokenizer)


def ask(messages, parse, stand_in="", tries=3, **params):
    """A server that says at once what --dry-run takes for likely."""
    for message in messages:
        common.dumps(common.MARKUP.sub(r"\g<0> ", message["content"])).encode()
    return parse({"text": stand_in, "finish": "stop", "thought": None})


def stand_ins(module):
    """In a stage that was just loaded: no model runs, no call is sent, no bootstrap is long."""
    module.load_model = lambda *_, **more: (TINY["model"], TINY["tokenizer"], "cpu")
    module.chat = lambda args: (ask, Counter())
    module.progress = lambda items, **_: items  # its bar would be most of a small run
    if module.__name__ == "01_generate":
        module.sample_batch = lambda model, prompts, n, *_, **more: [
            ([70, 71], "stop")] * (n * len(prompts))
    if module.__name__ == "03_verify":
        module.load_nli = lambda args: lambda documents, claim: [0.7] * len(documents)
    if module.__name__ == "05_train":
        module.encode_rows = partial(encoded, module.encode_rows)
        module.policy_of = lambda args, device: (TINY["model"], TINY["tokenizer"])
        module.check_head = lambda *_: None
        module.fingerprint = lambda *_: "key"
        module.reference_logps = lambda *_: {}
        module.train = lambda model, steps, held, reference, args, *_: [
            module.losses_of([*rows_in(step)], *[logps_of(step)] * 2, args)
            for step in (*steps, held) if step]
    if module.__name__ == "data/prepare":
        module.index = lambda path: None
    if module.__name__ == "06_eval":
        module.ranks = ranks
        module.estimate.__defaults__ = (None, 0, 9)
        module.paired.__defaults__ = module.calibrate.__defaults__ = (0, 9)


def encoded(encode_rows, tokenizer, rows, args):
    """05's, and the tokens are the text again; only the template opens turns."""
    found, by_id = encode_rows(tokenizer, rows, args), {row["id"]: row for row in rows}
    for row in found:
        was = by_id[row["id"]]
        for side, (prompt, completion) in zip(train.sides(args.loss), row["responses"]):
            text = tokenizer.decode([i for i in completion if i != tokenizer.eos_token_id],
                                    clean_up_tokenization_spaces=False)
            assert text == was[side][0]["content"].removeprefix(was.get("prefix") or "")
            turns = prompt.count(tokenizer.convert_tokens_to_ids("<|im_start|>"))
            assert turns == 1 + len(as_messages(was["prompt"])), "markup opens a turn"
    return found


def rows_in(step):
    """The rows of a step, however its lists are nested."""
    for part in step:
        yield from [part] if isinstance(part, dict) else rows_in(part)


def logps_of(step):
    """Log-probs of a step's responses."""
    rows = [*rows_in(step)]
    rows += [row["other"] for row in rows if "other" in row]
    return {r: torch.zeros(len(r[1])) for row in rows for r in row["responses"]}


def ranks(models, tokenizer, row, device):
    common.prompt_ids(tokenizer, as_messages(row["prompt"]), row.get("prefix", ""))
    said = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [0]
    return [1] * len(said), [True] * len(said)


def reader(name, script, fuzzed, flags, kept=kept, loss="dpo"):
    return pytest.param((script, fuzzed, flags, kept, loss), id=name)


CALLS = " --base-url http://localhost/v1 --model m --cache ''"
LOCAL = " --model m --device cpu --n 2 --max-new-tokens 2 --batch 4"
V, W = " --in {rows} --out {out}", " --concurrency 2" + CALLS
READERS = [
    reader("01 --prompts", "01_generate", "prompts", "--prompts {prompts} --out {out}" + LOCAL,
           kept_rows),
    reader("01 --classify", "01_generate", "prompts", "--prompts {prompts} --out {out} --classify"
           + CALLS, kept_rows),
    reader("01 --topics", "01_generate", "topics", "--topics {topics} --out {out} --n 1" + CALLS,
           kept_topics),
    reader("01 --few-shot", "01_generate", "given", "--prompts {prompts} --few-shot {given}"
           " --out {out}" + LOCAL),
    reader("02 rules", "02_decompose", "rows", f"{V} --questions-out {{new}}", kept_rows),
    reader("02 llm", "02_decompose", "rows", f"{V} --method llm --relevance --questions-out {{new}}"
           + W, kept_rows),
    *[reader(f"03 {name}", "03_verify", "rows", V + more, kept_rows) for name, more in (
        ("lexical", " --corpus {pages}"),
        ("lexical --open-search", " --open-search --corpus {pages}"),
        ("nli", " --method nli --corpus {pages}"),
        ("llm", " --method llm --corpus {pages}" + W),
        ("llm --open-search", " --method llm --open-search --corpus {pages}" + W),
        ("confidence", " --method confidence --answers {asked}"),
        ("answers", " --method answers --answers {asked} --corpus {pages}"),
        ("rate", " --method rate"), ("rate llm", " --method rate" + W))],
    reader("03 confidence --answers", "03_verify", "asked",
           V + " --method confidence --answers {asked}"),
    reader("03 answers --answers", "03_verify", "asked",
           V + " --method answers --answers {asked} --corpus {pages}"),
    reader("03 --corpus", "03_verify", "pages", V + " --open-search --corpus {pages}",
           kept_evidence),
    *[reader(f"04 {rule}{more}", "04_build_prefs", "rows", f"{rule} {V} {files}{more}", kept_groups,
             loss) for rule, more, files, loss in (
        ("facttune", "", "--eval-out {new}", "dpo"), ("facttune", " --reward max", "", "dpo"),
        ("sft", "", "", "sft"), ("rft", " --reward f1", "", "sft"),
        ("flame-sft", "", "--given {given}", "sft"), ("flame", "", "", "dpo"),
        ("factalign", " --balance", "", "factalign"), ("apeft", "", "--answers {asked}", "dpo"),
        ("apeft", " --unpaired", "--answers {asked}", "kto"))],
    reader("04 --given", "04_build_prefs", "given", f"flame-sft {V} --given {{given}}", kept_groups,
           "sft"),
    reader("04 --answers", "04_build_prefs", "asked", f"apeft {V} --answers {{asked}}",
           kept_groups),
    reader("04 --general", "04_build_prefs", "general", f"factalign {V} --general {{general}}",
           kept_groups, "factalign"),
    reader("04 --eval-prompts", "04_build_prefs", "elsewhere",
           f"facttune {V} --eval-prompts {{elsewhere}}", kept_groups),
    *[reader(f"05 {loss}", "05_train", rows, f"--prefs {{{rows}}} --out {{new}} --device cpu "
             f"--loss {loss}", kept_training, loss) for loss, rows in (
        ("dpo", "pairs"), ("ipo", "pairs"), ("rso", "pairs"), ("cpo", "pairs"),
        ("sft", "singles"), ("kto", "singles"), ("factalign", "singles"))],
    *[reader(f"05 {loss} --eval-prefs", "05_train", f"held_{rows}", f"--prefs {{{rows}}} "
             f"--eval-prefs {{held_{rows}}} --out {{new}} --device cpu --loss {loss}",
             kept_training, loss)
      for loss, rows in (("dpo", "pairs"), ("factalign", "singles"))],
    reader("06 score", "06_eval", "rows", "score --json --in {rows}", kept_json),
    reader("06 score, FActScore's", "06_eval", "human", "score --json --in {human}", kept_json),
    *[reader(f"06 compare {name}", "06_eval", fuzzed, "compare base={others} tuned={rows} "
             "--show 2 --out-json {out} --report {page} --out-md {new}", kept_comparison)
      for name, fuzzed in (("base", "others"), ("tuned", "rows"))],
    reader("06 agreement", "06_eval", "rows", "agreement --json --by kind,topic --in {rows}",
           kept_json),
    reader("06 calibration", "06_eval", "rows", "calibration --json --in {rows}", kept_json),
    reader("06 shift", "06_eval", "rows", "shift --json in={rows} --model m --base m", kept_json),
    reader("06 plot", "06_eval", "log", "plot a={log} --out {picture}", kept_picture),
    reader("06 winrate base", "06_eval", "others", "winrate --json base={others} tuned={rows} "
           "--out {out}" + W, kept_json),
    reader("06 winrate tuned", "06_eval", "rows", "winrate --json base={others} tuned={rows} "
           "--out {out}" + W, kept_json),
    reader("06 winrate single", "06_eval", "rows", "winrate --json a={rows}" + W, kept_json),
    reader("06 qa", "06_eval", "qa", "qa --json a={qa}", kept_json),
    reader("06 qa judge", "06_eval", "qa", "qa --json a={qa}" + W, kept_json),
    reader("prepare --corpus", "data/prepare", "sources", "--corpus {sources} --out {new}",
           kept_corpus),
]


# ---------------------------------------------------------------------------------------------
# What must hold

# Refusals in other words than `file:line: expected ..., found ...`: no line of the file is at fault
OTHERWISE = {"04_build_prefs": "no rows to train on", "05_train": "KTO needs responses"}


@st.composite
def topics(draw):
    lines = draw(st.lists(st.sampled_from([x for x in NASTY if isinstance(x, str)] + ["Fiji"]),
                          min_size=1, max_size=4))
    head, ending = draw(st.sampled_from([("", "\n"), ("", "\r\n"), ("\ufeff", "\n"), ("{", "\n")]))
    return (head + ending.join(lines)).encode("utf-8", "surrogatepass")


def good_files(folder):
    """{name: file} of all good files, written, and of what a stage may make."""
    names = {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in GOOD.items()}
    names["topics"] = folder / "topics.jsonl"
    names["topics"].write_text("Fiji\n", encoding="utf-8")
    return names | {name: folder / "made" / file for name, file in {
        "out": "out.jsonl", "new": "new", "page": "page.html", "picture": "picture.png"}.items()}


def begun(folder, script, fuzzed, flags, kept, loss):
    """A reader among good files. Its stage is loaded and reads its flags once for all cases."""
    names, module = good_files(folder), stage(script)
    stand_ins(module)
    flags = shlex.split(flags.format(**names))
    if hasattr(module, "parse_args"):
        with mock.patch.object(sys, "argv", [script, *flags]):
            args = module.parse_args()
        module.parse_args = lambda: copy.copy(args)
    return SimpleNamespace(script=script, fuzzed=fuzzed, flags=flags, kept=kept, loss=loss,
                           module=module, made=folder / "made", file=names[fuzzed],
                           out=names["out"], new=names["new"])


def play(case, data):
    """Give a stage one file with faults among good ones. True: it was taken, and nothing of it is
    lost or changed. False: it was refused, in one line, and nothing was written."""
    shutil.rmtree(case.made, ignore_errors=True)
    case.data = data
    case.file.write_bytes(data)
    began = time.time()
    code, case.said, err = here(case.script, *case.flags, module=case.module)
    case.err = re.sub("building .*, once\n", "", err)  # an index: no more than progress
    assert time.time() - began < HANG
    if code == 2:
        there = {path.name for path in case.made.glob("*")} - {"new.tmp"}  # prepare.py's, resumed
        assert not there, f"refused, but wrote {sorted(there)}"
        assert case.file.read_bytes() == data
        form = rf"{re.escape(str(case.made.parent))}/\S+: expected .+, (found:?|not so in) .+\n"
        last = case.err.splitlines()[-1] if case.err else ""
        assert re.fullmatch(form, case.err) or last.startswith(
            OTHERWISE.get(case.script, "-")), case.err
        return False
    assert code in (0, 1, None), case.err
    if case.kept:
        ends = "\n" if case.script == "data/prepare" else LINE_ENDS  # to JSON, \r is a blank
        case.rows = None if case.fuzzed == "topics" else meant(data, case.fuzzed, ends)
        case.kept(case)
    return True


@pytest.mark.parametrize("reader", READERS)
def test_any_file_is_read_whole_or_refused(reader, tmp_path):
    counts, case = Counter(), begun(tmp_path, *reader)
    assert play(case, case.file.read_bytes())

    @seed(sum(" ".join(reader[:3]).encode()))
    @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=HealthCheck)
    @given(topics() if case.fuzzed == "topics" else faulty(json.dumps(GOOD[case.fuzzed])))
    def check(data):
        counts["accepted" if play(case, data) else "refused"] += 1

    check()
    print(dict(counts))


# ---------------------------------------------------------------------------------------------
# Faults that were found so, each by the smallest file that showed it

def put(value, *keys):
    """An edit of good rows."""
    def edit(rows):
        place = rows
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
    return edit


def database(*rows):
    """The bytes of FActScore's table, with any values in it."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE documents (title, text)")
        for row in rows:
            with suppress(UnicodeEncodeError):  # half a character
                db.execute("INSERT INTO documents VALUES (?, ?)", row)
        db.commit()
        return db.serialize()


def damaged(rows):
    """A table whose first rows can be read: the long text goes on in a page that is not there."""
    data = database(("a", "b"), ("Fiji", "x" * 20_000))
    return data[:8192] + b"\xff" * 4 + data[8196:]


def instead(old, new):
    """The first row, as bytes, with other words in it."""
    return lambda rows: json.dumps(rows[0]).encode().replace(old, new, 1)


def half_fact_based(rows):
    rows[1]["fact_based"] = False
    del rows[1]["sentences"][0]["facts"][0]["label"]


def bad_prompts(rows):
    for row in rows:
        row["prompt"] = BAD


FACT = "sentences", 1, "facts", 0
BAD = ["Say a."]  # as a prompt
FAULTS = [  # reader, edit of its good rows, what it is
    ("02 rules", instead(b"{", b'{"id": "first", '), "a key that comes twice"),
    ("02 rules", instead(b"Suva", b"Suv\xe1"), "bytes that are no UTF-8"),
    ("02 rules", instead(b"5.0", b"1e999"), "a number that no float holds"),
    ("01 --topics", lambda rows: "Fiji\u2028Tonga\n".encode(), "U+2028 ends no line"),
    ("03 confidence", put(["x"], 0, *FACT, "evidence"), "odd evidence"),
    ("03 --corpus", lambda rows: database(("Fiji", 7)), "a text that is a number"),
    ("03 --corpus", lambda rows: database(("a", "b"), ("c", None)), "a text that is none"),
    ("03 --corpus", damaged, "a damaged page"),
    ("04 flame", half_fact_based, "a prompt that asks for facts here, and not there"),
    ("04 flame", put(10 ** 400, 0, "rating"), "a number that no float holds"),
    ("04 apeft", put("x", 0, "sentences", 0, "facts", 0, "answers", 0, "count"),
     "a count that is no number"),
    ("04 --answers", put([["x"]], 0, "question"), "a question that is a list"),
    ("04 --answers", put(BAD, 1, "prompt"), "a prompt that 05 refuses"),
    ("04 --given", put(BAD, 1, "prompt"), "a prompt that 05 refuses"),
    ("04 --general", put(BAD, 0, "prompt"), "a prompt that 05 refuses"),
    ("04 sft", bad_prompts, "a prompt that 05 refuses"),
    ("05 dpo", put([], 0, "prompt"), "a prompt without a message"),
    ("05 dpo", put("user<|im_start|>", 0, "prompt", 0, "role"), "markup opens a turn"),
    ("06 compare tuned", put(math.nan, 0, "sentences", 0, "start"), "a span that is no number"),
    ("06 shift", put(BAD, 0, "prompt"), "a prompt that is none"),
    ("03 rate", put("(" * 3000 + ")" * 3000, 0, "check"), "a regex that cannot be"),
    ("06 qa", put("a{99999999999}", 0, "check"), "a regex that cannot be")]


@pytest.mark.parametrize("name, edit, what", [
    pytest.param(*fault, id=f"{fault[0]}: {fault[2]}") for fault in FAULTS])
def test_found(name, edit, what, tmp_path):
    case = begun(tmp_path, *next(reader.values[0] for reader in READERS if reader.id == name))
    rows = copy.deepcopy(GOOD.get(case.fuzzed))
    made = edit(rows)
    play(case, made or b"".join(json.dumps(row).encode() + b"\n" for row in rows))


# ---------------------------------------------------------------------------------------------
# What is no JSONL, what is large, and the real command line

@pytest.mark.parametrize("more", ["", " --open-search"])
def test_any_sqlite_is_read_or_refused(more, tmp_path):
    """03 --corpus with values of all types of SQLite's, and with bytes that are no SQLite."""
    value = st.sampled_from(["Fiji", "Tonga", "Its capital is Suva.", b"a", b"\xff", *(
        x for x in NASTY if type(x) in (str, float) or x is None or x in (0, 1, -1))])
    cuts = st.none() | st.tuples(st.integers(0, 99), st.sampled_from(BYTES), st.booleans())
    case = begun(tmp_path, "03_verify", "pages", "--in {rows} --out {out} --corpus {pages}" + more,
                 None, "")

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None,
              suppress_health_check=HealthCheck)
    @given(st.lists(st.tuples(value, value), max_size=4), cuts)
    def check(rows, cut):
        data = database(*rows)
        if cut:
            at = cut[0] * len(data) // 100
            data = data[:at] + cut[1] + data[at + len(cut[1]):] * cut[2]
        for path in tmp_path.glob("pages.jsonl.*"):
            path.unlink()
        play(case, data)

    check()


def test_any_bytes_are_read_or_refused(tmp_path):
    piece = st.sampled_from([b'{"id": "a"}', b'{"id": 1e999}', b"\n", b"\r", b"\x00", b"\xff",
                             b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"NaN", b"[[", b'"', b"{", b"}"])

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
    @given(st.lists(piece | st.binary(max_size=5), max_size=8))
    def check(pieces):
        path = tmp_path / "x.jsonl"
        path.write_bytes(b"".join(pieces))
        err = io.StringIO()
        try:
            with redirect_stderr(err):
                assert all(isinstance(row["id"], str) for row in common.read_jsonl(path))
        except SystemExit as end:
            assert end.code == 2 and err.getvalue().count("\n") == 1

    check()


@pytest.mark.parametrize("which, data", [
    *[("out.jsonl", data) for data in (b"x\n", b"[1]\n", b"{}\n", b"\xff\n")],
    *[("out.jsonl.args.json", data) for data in (b"", b"x", b"[1]", b"{}", b"\xff")]])
def test_damaged_output_is_refused(which, data, tmp_path):
    flags = ["--in", write_rows(tmp_path / "in.jsonl", ROWS), "--out", tmp_path / "out.jsonl"]
    assert here("02_decompose", *flags)[0] == 0
    (tmp_path / which).write_bytes(data)
    before = snapshot(tmp_path)
    code, _, err = here("02_decompose", *flags)
    assert code == 2 and err.count("\n") == 1 and snapshot(tmp_path) == before, err


def fat(rows, what):
    """A file with one line of 10 MB, or a text of 1 MB; where time is short, a hundredth of it."""
    size, row = 10 ** (7 - (what == "text") - 2 * (CASES < 2000)), copy.deepcopy(rows[0])
    if what == "brackets":
        return "[" * size
    text = "It is an isle of the sea, and " * (size // 30)
    name = "note" if what == "note" else next(name for name in (
        "response", "output", "completion", "chosen", "text", "prompt", "loss") if name in row)
    row[name] = said("assistant", text) if name in ("completion", "chosen") else text
    return json.dumps(row)


@pytest.mark.parametrize("what", ["note", "text", "brackets"])
@pytest.mark.parametrize("reader", READERS)
def test_a_large_line_is_read_or_refused(reader, what, tmp_path):
    case = begun(tmp_path, *reader)
    rows = GOOD.get(case.fuzzed, [{"text": ""}])  # a topic is a line, too
    lines = fat(rows, what), *map(json.dumps, rows[1:])
    play(case, "".join(f"{line}\n" for line in lines).encode())


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader.id in (
    "01 --prompts", "02 rules", "03 lexical", "04 facttune", "05 dpo", "06 score",
    "prepare --corpus")])
def test_on_the_command_line(reader, tmp_path):
    script, fuzzed, flags, *_ = reader
    names = good_files(tmp_path)
    with open(names[fuzzed], "ab") as f:
        f.write(b'{"id": "half", "note": "\\ud83d"}\n')
    before, at = snapshot(tmp_path), len(GOOD[fuzzed]) + 1
    done = call(f"{script}.py", *shlex.split(flags.format(**names)))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{names[fuzzed]}:{at}: expected JSONL, one JSON object a line, ")
    (tmp_path / "made/new.tmp").unlink(missing_ok=True)
    assert snapshot(tmp_path) == before
