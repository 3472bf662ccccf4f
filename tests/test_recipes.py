"""The recipes: each from prompts to table on a model of a few words; each command line that they
write, by the stages' own parsers."""
import argparse
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr
from functools import cache, partialmethod
from io import StringIO
from statistics import fmean
from unittest import mock

import pytest
from conftest import ROOT, read_rows, stage, write_rows

NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.sh")
               if path.stem not in (SHARED := ("variables", "measure", "wide", "compare")))
FIELDS = ("Location", "Map references", "Languages", "Land boundaries", "Government type")
TWO_ROUNDS = {"ITERATIONS": "2", "LR": "3e-4"}
SAYS = [[f"It is a country in {where}." for where in ("Africa", "Asia", "Europe", "Oceania")],
        [f"Its official language is {x}." for x in ("French", "English", "Spanish", "Arabic")],
        ["It is a republic.", "It is a monarchy.", "It borders France.", "It borders China."]]


# ---------------------------------------------------------------------------------------------
# A model that says two or three of these sentences about every country, some of them true

def known_to_the_talker():
    return read_rows(ROOT / "data/prompts_general_train.jsonl")[3:60:7]


def talker(folder):
    """A tiny Llama, trained for 80 steps; of other instructions it knows nine examples."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    asked = [row["prompt"] for row in read_rows(ROOT / "data/prompts_train.jsonl")]
    others = known_to_the_talker()
    rng = random.Random(0)
    raw, bytewise = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.pre_tokenizer, raw.decoder = bytewise, decoders.ByteLevel()
    raw.train_from_iterator(
        [f"{a}{said}" for some in SAYS for said in some for a in ("", " ")] * 3 + asked[::40]
        + [row[key] for row in others for key in ("prompt", "example")],
        trainers.BpeTrainer(vocab_size=800, min_frequency=1, show_progress=False,
                            special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
                            initial_alphabet=bytewise.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>",
                                        eos_token="<|im_end|>",
                                        additional_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=2, pad_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def facts():
        return " ".join(rng.choice(some) for some in SAYS[:rng.choice((2, 3, 3))])

    for _ in range(80):
        pairs = [(rng.choice(asked), facts()) for _ in range(10)] + [
            (row["prompt"], row["example"] if rng.random() < 0.7 else facts())
            for row in rng.sample(others, 6)]
        coded = [tokenizer([f"<|im_start|>user\n{a}<|im_end|>\n<|im_start|>assistant\n",
                            f"{b}<|im_end|>"])["input_ids"] for a, b in pairs]
        width = max(len(a) + len(b) for a, b in coded)
        ids = torch.tensor([a + b + [0] * (width - len(a + b)) for a, b in coded])
        goal = torch.tensor([[-100] * len(a) + b + [-100] * (width - len(a + b))
                             for a, b in coded])
        model(input_ids=ids, labels=goal).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """run(recipe, **environment) on the talker and a corpus of five fields; run.at is its folder.
    Samples and the base's rows are shared, as they are in runs/."""
    if not (ROOT / "data/world/countries.jsonl").exists():
        pytest.skip("no world yet: python data/prepare.py")
    at = tmp_path_factory.mktemp("lab")
    address = at / "python"
    server = subprocess.Popen([sys.executable, "tests/forked.py", address], cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    talker(at / "model")
    write_rows(at / "corpus.jsonl", [row for row in read_rows(ROOT / "data/world/countries.jsonl")
                                     if row["field"] in FIELDS])

    write_rows(at / "prompts.jsonl", [  # 12 countries, two aspects each
        row for n, row in enumerate(read_rows(ROOT / "data/prompts_train.jsonl")[:48])
        if n // 4 % 2 == n % 2])

    def run(recipe, out=None, args=(), **more):
        env = {"PATH": os.environ["PATH"], "SMALL": "1", "MODEL": at / "model", "N": "4",
               "LR": "1e-3", "PY": f"{sys.executable} -I -S tests/forked.py {address}",
               "S": at / "samples", "CORPUS": at / "corpus.jsonl",
               "B": at / "base/base", "R": at / (out or recipe)}
        if recipe != "factalign":  # which wants prompts of each round
            env["PROMPTS"] = at / "prompts.jsonl"
        done = subprocess.run(["bash", f"recipes/{recipe}.sh", *args], cwd=ROOT, text=True,
                              env={k: str(v) for k, v in {**env, **more}.items()},
                              capture_output=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return at / (out or recipe)

    while not address.exists():
        assert server.poll() is None, "the forking Python died"
        time.sleep(0.1)
    run.at = at
    yield run
    server.kill()
    server.wait()


def flags(out):
    """What a stage was called with, by its memo."""
    return json.loads((out.parent / f"{out.name}.args.json").read_text(encoding="utf-8"))["flags"]


def log_of(out):
    rows = read_rows(out / "log.jsonl")
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def check_table(tuned):
    """base and tuned stand in the table, over the 16 prompts of SMALL=1, by their own rows."""
    table = tuned.with_name(f"{tuned.name}.compare.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (base|tuned) +\| (\d+) ", table, re.M) == [("base", "16"),
                                                                       ("tuned", "16")]
    rows = read_rows(f"{tuned}.jsonl")
    assert {row["gen"]["model"] for row in rows} == {str(tuned)} and len(rows) == 64
    assert (tuned / "config.json").exists() and not [*tuned.glob("step-*")]


def counts(row):
    labels = [fact["label"] for s in row["sentences"] for fact in s["facts"]
              if not fact.get("repeats")]
    return labels.count("S"), labels.count("NS")


def f1_at_k(row, k):
    """The harmonic mean of precision and recall, in so many words; 0 without a fact."""
    s, ns = counts(row)
    if not s:
        return 0.0
    precision, recall = s / (s + ns), min(s / k, 1)
    return 2 * precision * recall / (precision + recall)


def f1_at_10(row):
    return f1_at_k(row, 10)


def kinds(rows):
    return {row["kind"] for row in rows}


def text_of(row, side):
    return row[side][0]["content"]


def by_id(path):
    return {row["id"]: row for row in read_rows(path)}


# ---------------------------------------------------------------------------------------------
# From prompts to table

def test_facttune_fs(lab):
    """With its SFT stage. Each pair is of two samples of one prompt, the better by F1@10."""
    at = lab("facttune_fs", SFT="1")
    check_table(at / "tuned")
    said, pairs = by_id(lab.at / "samples/verified.jsonl"), read_rows(at / "prefs.jsonl")
    held = read_rows(at / "prefs_heldout.jsonl")
    assert len({row["topic"] for row in said.values()}) == 12 and kinds(pairs) == {"fact"}
    for row in pairs + held:
        good, bad = (said[name] for name in row["from"])
        assert good["prompt_id"] == bad["prompt_id"] == row["prompt_id"]
        assert f1_at_10(good) > f1_at_10(bad)
        assert (text_of(row, "chosen"), text_of(row, "rejected")) == (good["response"],
                                                                      bad["response"])
        assert row["score_chosen"] == pytest.approx(f1_at_10(good))
    assert {r["topic"] for r in pairs}.isdisjoint(r["topic"] for r in held) and held
    assert len(read_rows(at / "sft.jsonl")) == len(
        {(row["prompt_id"], row["response"]) for row in said.values()})
    assert flags(at / "tuned")["model"] == str(at / "sft")  # it starts where SFT ended
    steps, evals = log_of(at / "tuned")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert steps[-1]["loss"] < steps[0]["loss"] and len(steps) > 3 and len(evals) == 2
    assert abs(steps[0]["rewards/margins"]) < 0.02 < steps[-1]["rewards/margins"]


def test_facttune_mc(lab):
    """No verdict anywhere before the table; pairs by the mean of the facts' confidence."""
    at = lab("facttune_mc")
    check_table(at / "tuned")
    said, pairs = by_id(at / "confident.jsonl"), read_rows(at / "prefs.jsonl")
    answers = read_rows(lab.at / "samples/answers.jsonl")
    asked = read_rows(lab.at / "samples/questions.jsonl")
    assert [r["prompt_id"] for r in answers if r["id"].endswith("/0")] and len(
        answers) == 6 * len(asked) > 100
    assert '"label"' not in (at / "confident.jsonl").read_text(encoding="utf-8")

    def sure(row):
        return fmean(fact["conf"]["max"] for s in row["sentences"] for fact in s["facts"]
                     if "conf" in fact)

    assert pairs and kinds(pairs) == {"fact"}
    for row in pairs:
        good, bad = (sure(said[name]) for name in row["from"])
        assert 1 >= good > bad >= 1 / 6 and row["score_chosen"] == pytest.approx(good)
    assert log_of(at / "tuned")[0][-1]["rewards/margins"] > 0.02


def test_rft(lab):
    """One target a prompt: none of its samples has a higher F1@10, one has a lower."""
    at = lab("rft")
    check_table(at / "tuned")
    groups = {}
    for row in read_rows(lab.at / "samples/verified.jsonl"):
        groups.setdefault(row["prompt_id"], {})[row["id"]] = f1_at_10(row)
    rows = read_rows(at / "sft.jsonl") + read_rows(at / "sft_heldout.jsonl")
    assert {row["prompt_id"] for row in rows} == {
        name for name, scores in groups.items() if len(set(scores.values())) > 1}
    for row in rows:
        assert groups[row["prompt_id"]][row["id"]] == max(groups[row["prompt_id"]].values())
    steps, _ = log_of(at / "tuned")
    assert flags(at / "tuned")["loss"] == "sft" and steps[-1]["loss"] < steps[0]["loss"]


def test_apeft(lab):
    """LOSS=kto with the weights that 04 printed; ONLY=atomic, whose pairs are right over wrong."""
    at, alone = lab("apeft", LOSS="kto"), lab("apeft", "apeft-atomic", ONLY="atomic")
    check_table(at / "tuned")
    check_table(alone / "tuned")
    rows, pairs = read_rows(at / "prefs.jsonl"), read_rows(alone / "prefs.jsonl")
    assert kinds(rows) == {"fact", "atomic"} and kinds(pairs) == {"atomic"}
    good = sum(row["label"] for row in rows)
    told, was = flags(at / "tuned"), flags(alone / "tuned")
    assert told["loss"] == "kto" and good < len(rows) - good
    assert told["undesirable_weight"] == pytest.approx(good / (len(rows) - good), abs=1e-4)
    assert told["kind_weights"] == was["kind_weights"] == {"atomic": 1}
    assert log_of(at / "tuned")[0][0]["loss"] == pytest.approx(
        0.5 * fmean(1 if row["label"] else told["undesirable_weight"] for row in rows), abs=0.15)

    asked = {}
    for row in read_rows(alone / "known.jsonl"):
        for fact in (fact for s in row["sentences"] for fact in s["facts"] if "r" in fact):
            asked[row["topic"], fact["prefix"]] = fact
    assert len(pairs) > 5
    for row in pairs:
        fact, texts = asked[row["topic"], row["prefix"]], [text_of(row, "chosen"),
                                                           text_of(row, "rejected")]
        assert 0 < row["r"] == fact["r"] < 1
        labels = {f"{row['prefix']} {answer['text']}": answer["label"]
                  for answer in fact["answers"]}
        assert [labels[text] for text in texts] == ["S", "NS"]


@pytest.mark.parametrize("recipe, row, field", [
    ("flame", {"part": 1}, '"fact_based": true'), ("factalign", {"part": 1}, '"part": 2'),
    ("factalign", {"fact_based": True}, '"part": 1')])
def test_prompts_of_ones_own_that_lack_what_a_recipe_asks(recipe, row, field, tmp_path):
    """One line that says it, before any model is loaded."""
    path = write_rows(tmp_path / "mine.jsonl", [{"prompt": "Who?", "topic": "Fiji", **row}])
    done = subprocess.run(["bash", f"recipes/{recipe}.sh"], cwd=ROOT, text=True, env={
        "PATH": os.environ["PATH"], "PY": "false", "PROMPTS": str(path), "R": str(tmp_path / "r"),
    }, capture_output=True)
    assert done.returncode == 2
    assert done.stderr == f"{path}: expected prompts with {field}, found none\n"


def test_flame(lab):
    """Own answers and people's as SFT targets; pairs of both kinds, from what SFT made."""
    more = write_rows(lab.at / "more.jsonl", known_to_the_talker()[:8])
    at = lab("flame", MORE=more)
    check_table(at / "tuned")
    given = {row["id"]: row["example"] for row in read_rows(
        ROOT / "data/prompts_general_train.jsonl")}
    own = by_id(at / "elicited.jsonl")
    assert {len(row["prompt"]) < 100 for row in own.values()} == {True}  # without demonstrations
    for row in (rows := read_rows(at / "sft.jsonl")):
        source = {"if": given.get(row["id"]), "fact": own.get(row["id"], {}).get("response")}
        assert text_of(row, "completion") == source[row["kind"]]
    assert [row["id"] for row in rows if row["kind"] == "if"] == [*given]

    said, rated = by_id(at / "verified.jsonl"), by_id(at / "rated.jsonl")
    pairs = read_rows(at / "prefs.jsonl")
    assert {row["gen"]["model"] for row in rated.values()} == {str(at / "sft")}
    assert len(rated) == 4 * 32 and len(said) == 4 * 24 and kinds(pairs) == {"if", "fact"}
    for row in pairs:
        good, bad = (rated[name] for name in row["from"])
        if row["kind"] == "if":
            assert (good["rating"], bad["rating"]) == (5, 1)
        else:
            (s, ns), (less, more) = counts(said[good["id"]]), counts(said[bad["id"]])
            assert s / (s + ns) > less / (less + more) and good["rating"] == bad["rating"]
    for row in said.values():  # "In three sentences": the model says nothing but whole ones
        assert row["rating"] == (5 if len(row["sentences"]) == 3 else 1)
    assert {row["prompt_id"] in given for row in pairs if row["kind"] == "if"} == {True, False}
    told = flags(at / "tuned")
    assert told["halves"] is True and told["model"] == str(at / "sft")


def test_factalign(lab):
    """Two rounds: fresh prompts, the policy of the round before, and what it said stays."""
    at = lab("factalign", **TWO_ROUNDS)
    check_table(at / "round2")
    first, second = (read_rows(at / f"verified{i}.jsonl") for i in (1, 2))
    assert {r["gen"]["model"] for r in first} == {str(lab.at / "model")}
    assert {r["gen"]["model"] for r in second} == {str(at / "round1")}
    assert {r["topic"] for r in first}.isdisjoint(r["topic"] for r in second)
    assert {r["part"] for r in first} == {1} and {r["part"] for r in second} == {2}
    earlier, rows = read_rows(at / "prefs1.jsonl"), read_rows(at / "prefs2.jsonl")
    assert {row["id"] for row in earlier} < {row["id"] for row in rows}
    whole = {row["id"]: row for row in first + second}
    assert kinds(earlier) == kinds(rows) == {"fact", "general"}
    for row in rows:
        if row["kind"] == "fact":
            said = whole[row["id"]]
            facts = {said["response"][s["start"]:s["end"]]: [fact["label"] for fact in s["facts"]]
                     for s in said["sentences"]}
            assert row["label"] is (f1_at_10(said) > row["t"])
            assert len(facts) < len(said["sentences"]) or (row["sentence_label"] or []) == [
                facts[text].count("S") >= len(facts[text]) / 2  # t_s is one half
                for text in row["completion_sentences"] or ()]
    for number, some in ((1, earlier), (2, rows)):  # both labels weigh the same
        told, marks = flags(at / f"round{number}"), [m for r in some
                                                     for m in r.get("sentence_label") or []]
        for weight, labels in (("undesirable_weight", [row["label"] for row in some]),
                               ("sentence_undesirable_weight", marks)):
            assert told[weight] * labels.count(False) == pytest.approx(labels.count(True), 0.01)
        assert told["loss"] == "factalign" and told["ref"] == "start"
    assert flags(at / "round2")["model"] == str(at / "round1")


def test_measure_in_full(lab):
    """Without SMALL=1: every prompt, three decodings of either model, and the verdict."""
    write_rows(lab.at / "eval.jsonl", read_rows(ROOT / "data/prompts_eval.jsonl")[:4])
    tuned = lab.at / "full/tuned"
    shutil.copytree(lab.at / "model", tuned)
    lab("measure", args=[tuned], SMALL="", EVAL=lab.at / "eval.jsonl", B=lab.at / "full/base")
    names = [f"{name}{decoding}" for decoding in ("", "-cool", "-greedy")
             for name in ("base", "tuned")]
    for name in names:
        rows = read_rows(lab.at / f"full/{name}.jsonl")
        assert {row["gen"]["temperature"] for row in rows} == {
            0.3 if "cool" in name else 0 if "greedy" in name else 0.8}
        assert len(rows) == (4 if "greedy" in name else 16)
    table = (lab.at / "full/tuned.compare.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| ((?:base|tuned)(?:-cool|-greedy)?) +\| 4 ", table, re.M)
    assert sorted(shown) == sorted(names)
    assert "f1_at_k: tuned does not beat base" in table  # it is the same model


def test_compare(lab):
    """A method of two seeds, then another of one: a row of the table is the mean over the seeds;
    what is kept is enough for another machine to make the same tables without a model."""
    write_rows(lab.at / "eval.jsonl", read_rows(ROOT / "data/prompts_eval.jsonl")[:4])
    write_rows(lab.at / "ood.jsonl", read_rows(ROOT / "data/prompts_ood.jsonl")[:6])
    write_rows(lab.at / "train.jsonl", read_rows(ROOT / "data/prompts_train.jsonl")[:120:4])
    at, out = lab.at / "versus", lab.at / "kept"
    how = {"D": at, "OUT": out, "SMALL": "", "SEEDS": "1 2", "METHODS": "rft", "N": "3",
           "EVAL": lab.at / "eval.jsonl", "OOD": lab.at / "ood.jsonl",
           "PROMPTS": lab.at / "train.jsonl"}
    lab("compare", **how)
    how |= {"SEEDS": "1", "METHODS": "rft kto"}
    lab("compare", **how)
    tables = {path.stem: json.loads(path.read_text("utf-8")) for path in out.glob("*.json")}
    runs = {name: tables.pop(name) for name in ("rft1", "rft2", "kto1")}
    assert {*tables} == {"sampled", "ood", "general", "premise", "unsure", "sampled.first",
                         "sampled.second"}
    assert flags(at / "rft1/tuned")["seed"] == 1 and flags(at / "rft2/tuned")["seed"] == 2
    assert flags(at / "kto1/tuned")["loss"] == "kto"
    assert flags(at / "samples2/samples.jsonl")["seed"] == 2

    def f1(name, of=None):
        return (of or tables["sampled"]["rows"])[name]["metrics"]["f1_at_k"]["mean"]

    for method, seeds in (("rft", (1, 2)), ("kto", (1,))):
        of_seed, n = [runs[f"{method}{seed}"] for seed in seeds], len(seeds)
        said = [row for seed in seeds for row in read_rows(at / f"{method}{seed}/tuned.jsonl")]
        assert f1(method) == pytest.approx(fmean(f1("score", run) for run in of_seed))
        assert f1(method) == pytest.approx(fmean(f1_at_k(row, 5) for row in said))
        assert all(0 < run["seconds"][0] and {*run["shift"]} == {"id", "ood"} for run in of_seed)
        for name, expected in ((method, 16 * n), (f"{method}-greedy", 4 * n), ("base-greedy", 4)):
            assert tables["sampled"]["rows"][name]["n_responses"] == expected
        assert tables["ood"]["rows"][method]["n_responses"] == 6 * n
        rated = [row["rating"] for seed in seeds
                 for row in read_rows(at / f"{method}{seed}/tuned-general.jsonl")]
        assert tables["general"][method] == [rated.count(5), len(rated)] and len(rated) == 60 * n
    assert [v["against"] for v in tables["sampled"]["verdict"] if v["name"] == "rft"]
    made, born = state(out), state(at)
    lab("compare", **how)
    assert (state(out), state(at)) == (made, born)
    lab("compare", **{**how, "D": lab.at / "elsewhere"})  # nothing but what is kept
    assert state(out) == made and not (lab.at / "elsewhere/rft1").exists()


def test_the_table_that_is_told(tmp_path):
    """RESULTS.md's script prints RESULTS.md's tables from what is kept, and the rows that are
    kept have the scores that are kept."""
    told = (ROOT / "RESULTS.md").read_text("utf-8").partition("\n## Head to head")[2]
    script = re.search(r"```python\n(.*?)```", told, re.S)[1]
    lines = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, check=True,
                           capture_output=True).stdout.splitlines()
    assert len(lines) > 6 and not {*lines} - {*told.splitlines()}
    first = (ROOT / "README.md").read_text("utf-8").partition("\n![")[0].splitlines()
    names = {"base, sampled": "base", "base, greedy": "base-greedy", "SFT on all": "sft",
             "SFT on the best": "rft", "KTO": "kto", "**FactTune-FS": "facttune_fs",
             "**FactTune-MC": "facttune_mc", "**FLAME": "flame", "**FactAlign": "factalign",
             "**APEFT": "apeft"}
    for said, name in names.items():  # README's first table says no other number
        row, = (line for line in first if line.startswith(f"| {said}"))
        cells = [cell for line in lines if line.startswith(f"| {name} |")
                 for cell in line.split(" | ")]
        assert {*re.findall(r"[\d.]+ \[.*?\]", row)} <= {*cells}, row
        facts = [fact for output in read_rows(ROOT / "data/results/blind_compare.jsonl")
                 for sentence in output["sentences"] for fact in sentence["facts"]
                 if output["set"] == name and not fact.get("repeats")]
        true = [fact[reader] == "S" for fact in facts for reader in ("human", "second")]
        assert row.split("|")[-2].strip() == (f"{100 * sum(true) / len(true):.0f}" if true else "")
    kept = ROOT / "data/results/compare"
    subprocess.run([sys.executable, "recipes/rows.py", "unpack", tmp_path,
                    *kept.glob("*.jsonl.gz")], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "06_eval.py", "compare", "--out-json", tmp_path / "all.json", *(
        f"{path.stem.partition('-')[0]}={path}" for path in tmp_path.glob("*-sampled.jsonl"))],
        cwd=ROOT, check=True, capture_output=True)
    rows = json.loads((tmp_path / "all.json").read_text("utf-8"))["rows"]
    known = json.loads((kept / "sampled.json").read_text("utf-8"))["rows"]
    assert {name: known[name] for name in rows} == rows


def test_rows_there_and_back(tmp_path):
    """pack drops the evidence and nothing else; unpack puts the seeds into one file."""
    fact = {"text": "Fiji is in Oceania", "label": "S", "kind": "region",
            "evidence": [{"text": "é"}]}
    row = {"id": "fiji/0", "prompt_id": "fiji", "response": "…", "sentences": [{"facts": [fact]}]}
    for seed in (1, 2):
        subprocess.run([sys.executable, "recipes/rows.py", "pack",
                        tmp_path / f"my_rft{seed}.jsonl.gz",
                        f"a={write_rows(tmp_path / 'a.jsonl', [row])}",
                        f"b={write_rows(tmp_path / 'b.jsonl', [{'id': 'x', 'response': ''}])}"],
                       cwd=ROOT, check=True)
    one, two = (tmp_path / f"my_rft{seed}.jsonl.gz" for seed in (1, 2))
    assert one.read_bytes() == two.read_bytes()
    subprocess.run([sys.executable, "recipes/rows.py", "unpack", tmp_path / "all", two, one],
                   cwd=ROOT, check=True)
    del fact["evidence"]
    a, b = (read_rows(tmp_path / f"all/my_rft-{name}.jsonl") for name in "ab")
    assert a == [{"set": "a", **row, "id": f"fiji/0s{seed}"} for seed in (1, 2)]
    assert b == [{"set": "b", "id": f"xs{seed}", "response": ""} for seed in (1, 2)]


def test_reference_targets(tmp_path):
    """Three sentences of the page's own words about what is asked; without any no row."""
    fields = {"Location": "Oceania, island group in the Pacific (Melanesia); remote",
              "Capital": "name: Suva (on Viti Levu); time difference: UTC+12",
              "Languages": "English (official) 20.5%, Fijian 4%, Hindi, Rotuman, other (2007 est.)",
              "Government type": "parliamentary republic", "Climate": "tropical marine."}
    page = [{"title": "Fiji", "field": name, "text": text} for name, text in fields.items()]
    prompts = [{"id": f"fiji-{aspect}", "topic": "Fiji", "prompt": "?", "part": 2}
               for aspect in ("geo", "gov", "eco")]
    subprocess.run([sys.executable, "recipes/reference.py", "--out", tmp_path / "out.jsonl",
                    "--corpus", write_rows(tmp_path / "corpus.jsonl", page),
                    "--prompts", write_rows(tmp_path / "p.jsonl", prompts)], cwd=ROOT, check=True)
    assert read_rows(tmp_path / "out.jsonl") == [{**row, "response": said} for row, said in zip(
        prompts, ["Fiji is located in Oceania, island group in the Pacific. Its climate is tropical"
                  " marine.", "The capital of Fiji is Suva. It is a parliamentary republic. Its "
                  "languages are English, Fijian, Hindi, Rotuman."])]


def state(*folders):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for folder in folders
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("recipe, more", [("factalign", TWO_ROUNDS),
                                          ("apeft", {"LOSS": "kto"})])
def test_again(lab, recipe, more):
    """The same command once more: the same bytes, and no weight trained or text sampled again."""
    at = lab(recipe, **more)
    made, born = state(lab.at), {path: path.stat().st_mtime_ns
                                 for path in at.rglob("model.safetensors")}
    lab(recipe, **more)
    assert state(lab.at) == made and born
    assert {path: path.stat().st_mtime_ns for path in born} == born


# ---------------------------------------------------------------------------------------------
# Every command line, in all variants: a Python that only notes what it is asked to run, looks
# whether the files are there, and writes a few rows of each kind

RECORDER = r"""#!/usr/bin/env bash
set -e
(IFS=$'\x1f'; printf '%s\x1e' "$*" >> "$NOTES")
for word in "$@"; do
  case $before in
    --out | --questions-out | --eval-out | --out-md | --out-json | --report | --pictures)
      outs="$outs $word";;
    *) for path in "$word" "${word#*=}"; do
         case $path in runs/* | data/prompts* | given.jsonl | mine.jsonl)
           [ -e "$path" ] || { echo "$path is not there" >&2; exit 3; };;
         esac
       done;;
  esac
  before=$word
done
for out in $outs; do
  if [[ $1 = 05* ]]; then
    mkdir -p $out
    out=$out/log.jsonl
  fi
  for kind in fact atomic if general; do
    for asks in true false; do
      echo "{\"kind\": \"$kind\", \"fact_based\": $asks, \"part\": 1}"
    done
  done > $out
done
case "$1 $* " in
  04*' factalign '*) echo --undesirable-weight 0.5000 --sentence-undesirable-weight 0.2500;;
  04*' --unpaired '*) echo --undesirable-weight 0.5000;;
esac
"""
JUDGED = {"JUDGE": "judge", "BASE_URL": "http://h:1/v1", "CORPUS": "wiki.db", "MODEL": "org/policy",
          "PROMPTS": "mine.jsonl", "EVAL": "given.jsonl"}
ALL = [{}, {"SMALL": "1"}, JUDGED, {"SAMPLE": "--temperature 0.55", "TRAIN": "--optim rmsprop"},
       {"LR": "3e-6", "N": "7"}]
VARIANTS = [(name, env, "") for name in NAMES for env in ALL] + [
    ("facttune_fs", {"SFT": "1"}, "--model runs/facttune_fs/sft"),
    ("facttune_fs", {"SFT": "1", **JUDGED}, "--model runs/facttune_fs/sft"),
    ("facttune_fs", {"PAIRS": "all", "REWARD": "precision"},
     "--reward precision --k 10 --pairs all"),
    ("facttune_mc", {"PAIRS": "all", "REWARD": "neg_ent"}, "--reward neg_ent --pairs all"),
    ("facttune_mc", {"ANSWERS": "3"}, "--n 3 "),
    ("rft", {"REWARD": "precision"}, "--reward precision"),
    ("rft", {"TARGETS": "all"}, "04_build_prefs.py sft --in"),
    ("facttune_fs", {"LOSS": "kto"}, "--loss kto --undesirable-weight 0.5000"),
    ("facttune_fs", {"MARGIN": "0.05"}, "--margin 0.05"),
    ("facttune_mc", {"SEED": "7", "EPOCHS": "3"},
     "--epochs 3 --save-every 10 --out runs/facttune_mc/tuned --seed 7"),
    ("flame", {"SFT": "0"}, "--halves --prefs runs/flame/prefs.jsonl --model data/world/model"),
    ("flame", {"SFT": "0", **JUDGED}, "--prefs runs/flame/prefs.jsonl --model org/policy"),
    ("flame", {"TARGETS": "given"}, "--targets given"),
    ("flame", {"GIVEN": "given.jsonl"},
     "--classify --prompts given.jsonl --model data/world/model"),
    ("flame", {"GIVEN": "given.jsonl", "MORE": "", **JUDGED},
     "--classify --prompts given.jsonl --model judge --base-url http://h:1/v1"),
    ("flame", {"ONLY": "if"}, "--only if"), ("flame", {"ONLY": "fact"}, "--only fact"),
    ("factalign", {"GENERAL": "", "LOSS": "kto"}, "--loss kto --undesirable-weight 0.5000"),
    ("factalign", {"GENERAL": "org/mix:train"}, "--general org/mix:train"),
    ("factalign", {"ONLY": "general", "LOSS": "kto"}, "--only general"),
    ("factalign", {"ITERATIONS": "1"}, "round1=runs/factalign/round1/log.jsonl"),
    ("factalign", {"T": "0.75", "T_S": "1", "K": "100"}, "--k 100 --t 0.75 --t-s 1"),
    ("factalign", {"SENTENCE_BETA": "0.2"}, "--sentence-beta 0.2"),
    ("factalign", {"PRECISION_SHARE": "0.5"}, "--precision-share 0.5"),
    ("factalign", {"REF": "base"}, "--ref base"),
    ("factalign", {"SFT_DATA": "given.jsonl"}, "--loss sft --prefs given.jsonl"),
    *[("apeft", {"LOSS": loss}, f"--loss {loss} " + "--undesirable-weight" * (loss == "kto"))
      for loss in ("dpo", "ipo", "rso", "cpo", "kto")],
    *[("apeft", {"KEEP": known}, f"--keep {known}") for known in ("unknown", "known")],
    ("apeft", {"ONLY": "fact"}, "--kind-weights fact=1"),
    ("apeft", {"ONLY": "atomic", "LOSS": "kto"}, "--kind-weights atomic=1"),
    ("apeft", {"WEIGHT": "0.3"}, "--kind-weights atomic=0.3")]


# No beginning of a flag is taken for the flag
EXACT = partialmethod(argparse.ArgumentParser.__init__, allow_abbrev=False)


@cache
def parsed(words):
    """What a stage's own parse_args() makes of a command line."""
    err, module = StringIO(), stages(words[0])
    with (mock.patch.object(sys, "argv", [*words]), redirect_stderr(err),
          mock.patch.object(argparse.ArgumentParser, "__init__", EXACT)):
        try:
            return module.parse_args()
        except SystemExit:
            pytest.fail(f"{' '.join(words)}: {err.getvalue()[-300:]}")


@cache
def stages(name):
    return stage(name.removesuffix(".py"))


@pytest.fixture
def place(tmp_path):
    """A folder that looks like the repository to a recipe, and is nobody's runs/."""
    for name in ("recipes", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    rows = [{"prompt": "?", "response": "!", "part": part, "fact_based": asks}
            for part in (1, 2, 3) for asks in (True, False)]
    write_rows(tmp_path / "mine.jsonl", rows)
    write_rows(tmp_path / "given.jsonl", rows * 20)
    (tmp_path / "wiki.db").touch()
    (tmp_path / "python").write_text(RECORDER)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("recipe, env, expected", [
    pytest.param(*one, id=" ".join([one[0], *(f"{key}={value}" for key, value in one[1].items()
                                              if JUDGED.get(key) != value or key == "JUDGE")]))
    for one in VARIANTS])
def test_command_lines(place, recipe, env, expected):
    done = subprocess.run(["bash", f"recipes/{recipe}.sh"], cwd=place, capture_output=True,
                          text=True, env={"PATH": os.environ["PATH"], "PY": "./python",
                                          "NOTES": "notes", **env})
    assert done.returncode == 0, done.stderr
    lines = [tuple(line.split("\x1f"))
             for line in (place / "notes").read_text(encoding="utf-8").split("\x1e")[:-1]]
    calls = [(" ".join(line), parsed(line)) for line in lines]
    assert any(expected in line for line, _ in calls)
    assert calls[-1][0].startswith("06_eval.py compare base=runs/base")
    small = env.get("SMALL", "")
    last = f"runs/{recipe}{small}/" + (f"round{env.get('ITERATIONS', 3)}" if recipe == "factalign"
                                       else "tuned")
    assert f" tuned={last}.jsonl " in calls[-1][0]
    assert ("base-greedy=" in calls[-1][0]) == (not small)

    of = {name: [args for line, args in calls if line.startswith(name)]
          for name in ("01", "02", "03", "04", "05")}
    trained = [args for args in of["05"] if args.loss != "sft" or recipe == "rft"]
    assert all(args.full for args in of["05"]) and trained
    assert all(args.eval_prompts == env.get("EVAL", "data/prompts_eval.jsonl")
               for args in of["04"])  # no topic of the evaluation slips in
    wanted = env.get("LOSS", {"rft": "sft", "factalign": "factalign"}.get(recipe, "dpo"))
    assert {args.loss for args in trained} == {wanted}
    if "LR" in env:
        assert {args.lr for args in trained} == {3e-6}
        assert 7 in {args.n for args in of["01"]}
    if "TRAIN" in env:
        assert {args.optim for args in trained} == {"rmsprop"}
        assert 0.55 in {args.temperature for args in of["01"]}
    else:
        assert {args.optim for args in trained} == {"adamw"}
    policy = env.get("MODEL", "data/world/model")
    asked = [args for args in of["01"] if not args.classify]
    assert {args.base_url for args in asked} == {None}  # the policy is here, the judge there
    assert {args.model for args in asked} <= {policy, *(args.out for args in of["05"])}
    ruled = [args for args in of["02"] + of["03"] if not args.base_url]
    if "JUDGE" not in env:
        assert len(ruled) == len(of["02"] + of["03"])
    else:  # sentences for SFT, the checks of our own instructions, and confidence need no judge
        assert {args.method for args in ruled} <= {"rules", "rate", "confidence"}
        assert sum(args.method == "rules" for args in ruled) == (
            recipe == "flame" and env.get("SFT") != "0" or env.get("SFT") == "1")
        verdicts = [args for args in of["03"] if args.method in ("llm", "answers")]
        assert {args.corpus for args in verdicts} == {"wiki.db"}
        assert {args.model for args in verdicts} == {"judge"}


@pytest.mark.parametrize("env, said", [
    ({"EVAL": "none.jsonl"}, "none.jsonl: no such file"), ({"CORPUS": "none.db"}, "none.db: no"),
    ({"PROMPTS": "none.jsonl"}, "none.jsonl: no such file"),
    ({"JUDGE": "judge"}, "expected with JUDGE=judge also BASE_URL=")])
def test_what_is_missing_is_told_before_any_work(place, env, said):
    done = subprocess.run(["bash", "recipes/facttune_fs.sh"], cwd=place, capture_output=True,
                          text=True, env={"PATH": os.environ["PATH"], "PY": "./python",
                                          "NOTES": "notes", **env})
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert not (place / "notes").exists() and not (place / "runs").exists()


@pytest.mark.parametrize("codes, status, calls", [
    ([0], 0, 1), ([1, 0], 0, 2), ([1, 1], 0, 2), ([2], 2, 1), ([1, 2], 2, 2), ([130], 130, 1)])
def test_rows_that_failed_are_asked_once_more(codes, status, calls, place):
    """Exit 1 has a second try, then the recipe goes on; any other ends it, as set -e would."""
    (place / "stage").write_text("#!/bin/sh\necho >> calls\n" + "".join(
        f"[ $(wc -l < calls) != {n} ] || exit {code}\n" for n, code in enumerate(codes, 1)))
    (place / "stage").chmod(0o755)
    done = subprocess.run(["bash", "-c", ". recipes/variables.sh; twice ./stage; echo on"],
                          cwd=place, capture_output=True, text=True)
    assert (place / "calls").read_text().count("\n") == calls
    assert done.returncode == status and (done.stdout == "on\n") == (status == 0)


def test_help_is_the_header(place):
    for recipe in NAMES:
        done = subprocess.run(["bash", f"recipes/{recipe}.sh", "--help"], cwd=place, text=True,
                              capture_output=True)
        lines = (ROOT / f"recipes/{recipe}.sh").read_text("utf-8").splitlines()
        assert done.returncode == 0 and len(done.stdout.splitlines()) >= 3
        assert [f"# {line}".rstrip() for line in done.stdout.splitlines()] == lines[1:1 + len(
            done.stdout.splitlines())]


def test_small_measures_the_first_prompts_of_ones_own(place):
    """Not every fourth, as of the world's, which come four to a country."""
    rows = write_rows(place / "own.jsonl", [{"prompt": f"{n}?"} for n in range(20)])
    (place / "runs/x").mkdir(parents=True)
    env = {"PATH": os.environ["PATH"], "PY": "./python", "NOTES": "notes", "SMALL": "1"}
    for file, numbers in ((rows, range(16)), (None, range(0, 64, 4))):
        more = {"EVAL": file.name} if file else {}
        done = subprocess.run(["bash", "recipes/measure.sh", "runs/x"], cwd=place, text=True,
                              env={**env, **more}, capture_output=True)
        assert done.returncode == 0, done.stderr
        asked = read_rows(file or ROOT / "data/prompts_eval.jsonl")
        assert read_rows(place / "runs/base1/base.prompts.jsonl") == [asked[n] for n in numbers]


VARIABLE = re.compile(r"\$\{?([A-Z][A-Z_]*)")
METHODS = [line.split(None, 2) for line in
           (ROOT / "recipes/methods.txt").read_text("utf-8").splitlines() if line[:1].isalpha()]


@pytest.mark.parametrize("name, recipe, settings", [
    pytest.param(*line, *[""] * (3 - len(line)), id=line[0]) for line in METHODS])
def test_methods(place, name, recipe, settings):
    """Each line's recipe is there and knows its variables, each stage the flags that result."""
    env = dict(word.split("=", 1) for word in shlex.split(settings))
    if "PROMPTS" in env:
        env["PROMPTS"] = "mine.jsonl"
    known = set(VARIABLE.findall("".join((ROOT / f"recipes/{part}.sh").read_text("utf-8")
                                         for part in (recipe, "variables"))))
    assert {*env} <= known and re.fullmatch(r"[a-z_]+[a-z]", name)
    done = subprocess.run(["bash", f"recipes/{recipe}.sh"], cwd=place, capture_output=True,
                          text=True, env={"PATH": os.environ["PATH"], "PY": "./python",
                                          "NOTES": "notes", **env})
    assert done.returncode == 0, done.stderr
    for line in (place / "notes").read_text(encoding="utf-8").split("\x1e")[:-1]:
        parsed(tuple(line.split("\x1f")))




@pytest.mark.parametrize("recipe", [*NAMES, *SHARED])
def test_header_names_what_is_there(recipe):
    """Each VARIABLE= of a recipe's header is one of the recipes; each --flag of a comment
    is one of a stage's; it speaks of no other recipe's command."""
    text = (ROOT / f"recipes/{recipe}.sh").read_text(encoding="utf-8")
    header = text.partition("\nset -e")[0]
    known = set(VARIABLE.findall("".join(path.read_text("utf-8")
                                         for path in (ROOT / "recipes").glob("*.sh"))))
    assert set(re.findall(r"(?<![\w$])([A-Z][A-Z_]*)=", header)) <= known
    assert set(re.findall(r"\b([A-Z]+_[A-Z_]+)\b", header)) <= known
    assert set(re.findall(r"bash recipes/(\w+)\.sh", header)) <= {recipe}
    source = "".join(path.read_text("utf-8") for path in (
        *ROOT.glob("[0-9][0-9]_*.py"), ROOT / "common.py", ROOT / "tests/second_verifier.py"))
    for flag in {*re.findall(r"(?<![\w-])--[a-z][\w-]*", text)} - {"--help"}:
        assert f'"{flag}"' in source, flag
