"""What README and data/README tell a reader to type, typed: every line of their shell blocks, as it
is printed, in a copy of the repository with a model of a few words and a server on loopback. And
the worked examples of data/examples, each applied there and then really used.

Where a script has changed so that an example no longer applies, make it anew:

    f=data/examples/NAME.diff
    git apply --3way $f                            # and mend by hand what it marks
    sed -i '/^diff --git/,$d' $f; git diff -U1 HEAD -- '*.py' >> $f; git checkout HEAD -- '*.py'
"""
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import metadata
from types import SimpleNamespace
from unittest import mock

import pytest
import server
from conftest import ROOT, read_rows, write_rows
from test_recipes import FIELDS, talker

EXAMPLES = sorted((ROOT / "data/examples").glob("*.diff"))
RIVERS = ["Danube", "Rhine", "Elbe", "Oder", "Volga", "Loire", "Rhone", "Po", "Ebro", "Tagus"]
ELSEWHERE = {  # beginning of a line that is not run here: who runs it
    "SMALL=1 bash recipes/": "tests/test_recipes.py, each to its table",
    "make world": "the Makefile, for each `make demo` and `make test`",
    "pip install": "nobody: no test loads anything",
    "transformers serve": "a person, for tests/test_real_server.py"}


# ---------------------------------------------------------------------------------------------
# A policy and a judge on a server

def policy(text, request):
    """Thinks of a new topic where 01 asks for one; of a prompt it says a thing or two."""
    if "Subject: " in text:
        return f"Subject: {RIVERS[request['seed'] % 10]} {request['seed']}\nPrompt: What is it?"
    return f"The answer has {len(text)} letters, some of them vowels. It is short."


def judge(text, request):
    """Takes apart, searches, judges and compares."""
    last = text.strip().split("\n")[-1]
    if "Supported]" in text or last.startswith("Query:"):
        return server.repeat(text, request)
    return server.longer(text, request) if "[[A]]" in text else server.facts(text, request)


MODELS = {"policy": policy, "judge": judge, "data/world/model": policy}


# ---------------------------------------------------------------------------------------------
# The place

def blocks(path):
    """{heading: [its shell blocks]} of a text, without the lines that others run."""
    text, found, heading = (ROOT / path).read_text(encoding="utf-8"), {}, ""
    for title, kind, block in re.findall(r"(?ms)^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", text):
        heading = title or heading
        lines = [line for line in block.splitlines() if not line.startswith((*ELSEWHERE,))]
        if kind == "sh" and lines:
            found.setdefault(heading, []).append("\n".join(lines))
    return found


def examples(sentence):
    """The rows of a JSON block of README that begin like this, for each river."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = json.loads(re.search(rf'^{{"{sentence}": .*$', text, re.M)[0])
    return [{key: value.replace("Danube", name) for key, value in row.items()} for name in RIVERS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """place(script): runs lines of shell in a copy of the repository, which is place.at. There the
    embedded model is test_recipes' talker, and its corpus has five fields a country."""
    if not (ROOT / "data/world/countries.jsonl").exists():
        pytest.skip("no world yet: python data/prepare.py")
    at = tmp_path_factory.mktemp("guide")
    shutil.copytree(ROOT, at, dirs_exist_ok=True, ignore=lambda folder, names: [
        name for name in names if name in ("world", "runs", "results") or name.startswith(".")
        or re.search(r"\.fts5|replies\.sqlite", name)])
    talker(at / "data/world/model")
    (at / "Qwen").mkdir()
    os.symlink(at / "data/world/model", at / "Qwen/Qwen2.5-0.5B-Instruct")
    write_rows(at / "data/world/countries.jsonl", [
        row for row in read_rows(ROOT / "data/world/countries.jsonl") if row["field"] in FIELDS])
    (at / "topics.txt").write_text("rivers\nlakes\n", encoding="utf-8")
    prompts, pages = examples("topic"), examples("title")
    write_rows(at / "prompts.jsonl", prompts[:6])
    write_rows(at / "eval.jsonl", prompts[6:])
    write_rows(at / "pages.jsonl", pages)
    with gzip.open(at / "wiki.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in pages)

    python, address = at / "bin/python", at / "socket"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S tests/forked.py {address} "$@"\n')
    python.chmod(0o755)
    forking = subprocess.Popen([sys.executable, "tests/forked.py", address], cwd=at,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    env = {"PATH": f"{python.parent}:{os.environ['PATH']}", "PY": str(python), "SMALL": "1",
           "HOME": str(at), "HF_HUB_OFFLINE": "1", "GIT_CEILING_DIRECTORIES": str(at.parent)}
    with mock.patch.object(server, "__file__", __file__), server.serve() as running:
        while not address.exists():
            assert forking.poll() is None, "the forking Python died"
            time.sleep(0.1)

        def run(script):
            script = re.sub(r"http://localhost:800\d/v1", running.url, script)
            done = subprocess.run(["bash", "-ec", script], cwd=at, env=env, text=True,
                                  capture_output=True)
            assert done.returncode == 0, f"{script}\n{done.stdout[-800:]}\n{done.stderr[-3000:]}"
            return SimpleNamespace(out=done.stdout, err=done.stderr)

        run.at, run.seen = at, running.seen
        yield run
        forking.kill()
        forking.wait()


@pytest.fixture(scope="module")
def walked(place):
    """After README's walk through the stages; its rows stand for the demo's, too."""
    place("\n".join(blocks("README.md")["Stage by stage"]))
    shutil.copytree(place.at / "data/world/model", place.at / "runs/demo/tuned")
    for side in ("base", "tuned"):
        for name, suffix in (("verified", ""), ("samples", ".samples")):
            shutil.copy(place.at / f"runs/dev/{name}.jsonl",
                        place.at / f"runs/demo/{side}{suffix}.jsonl")
    return place


# ---------------------------------------------------------------------------------------------
# README, as printed

def test_what_is_run_elsewhere():
    """Nothing stands on that list that README does not say."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"\n{line}" in text for line in ELSEWHERE)


def test_stage_by_stage(walked):
    """112 responses of 28 prompts on 7 countries, verdicts on all of them, a trained adapter."""
    dev = walked.at / "runs/dev"
    rows = read_rows(dev / "verified.jsonl")
    assert len(rows) == 112 and len({row["topic"] for row in rows}) == 7
    assert {fact["label"] for row in rows for s in row["sentences"] for fact in s["facts"]} == {
        "S", "NS"}
    assert (dev / "tuned/adapter_model.safetensors").exists() and (dev / "curves.png").exists()


READ_ON = [heading for heading in blocks("README.md") if heading != "Stage by stage"]


@pytest.mark.parametrize("heading", READ_ON)
def test_blocks_of_the_readme(walked, heading):
    """Each ends with 0, in the order of the text: a block may read what one before it wrote."""
    for block in blocks("README.md")[heading]:
        walked(block)


def test_your_own(walked):
    """The run on prompts, pages, model and judge of one's own: its facts are the judge's, and the
    table speaks of the prompts to measure on."""
    mine = walked.at / "runs/mine"
    if not (mine / "facttune/tuned.compare.md").exists():
        walked(blocks("README.md")["Your own model, prompts, corpus, judge"][0])
    facts = [fact for row in read_rows(mine / "samples/verified.jsonl") for s in row["sentences"]
             for fact in s["facts"]]
    assert facts and all(server.supported(fact["text"]) == (fact["label"] == "S")
                         for fact in facts)
    assert {e["title"] for fact in facts for e in fact["evidence"]} <= {*RIVERS}
    assert {row["topic"] for row in read_rows(mine / "facttune/tuned.jsonl")} <= {*RIVERS[6:]}


@pytest.mark.skipif(not shutil.which("jq"), reason="no jq here")
def test_jq():
    """The one-liners of README (a name a line) and factalign.sh make the prompts that they say."""
    def made(path, given):
        flags, program = re.search(r"jq (-\w+) '(.*?)'", path.read_text(encoding="utf-8")).groups()
        done = subprocess.run(["jq", flags, program], input="\n".join(given) + "\n", text=True,
                              check=True, capture_output=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    bios = made(ROOT / "README.md", ['Ada "Lovelace"', "Émile Zola"])
    assert bios == [{"topic": name, "prompt": f"Tell me a bio of {name}."}
                    for name in ('Ada "Lovelace"', "Émile Zola")]
    parts = made(ROOT / "recipes/factalign.sh", [json.dumps({"prompt": n}) for n in range(6)])
    assert sorted((row["part"], row["prompt"] % 3) for row in parts) == [
        (1, 2), (1, 2), (2, 0), (2, 0), (3, 1), (3, 1)]


def test_blocks_of_data_readme(place):
    import pyarrow
    import pyarrow.parquet
    rows = read_rows(place.at / "pages.jsonl")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place.at / "wiki-0.parquet")
    place("python data/prepare.py --corpus pages.jsonl --out enwiki.db; rm -f enwiki.db.fts5")
    for block in sum(blocks("data/README.md").values(), []):
        place(block)
    assert (place.at / "wiki.db").exists() and (place.at / "enwiki.db.fts5").exists()


# ---------------------------------------------------------------------------------------------
# The examples

def commands(example):
    """The commands above a diff, the first of which applies it."""
    head = example.read_text(encoding="utf-8").partition("diff --git")[0]
    return re.findall(r"(?m)^  ((?:git|python) .*?)(?: {2,}.*)?$", head)


@pytest.fixture
def example(walked):
    """example(name, flags) applies data/examples/NAME.diff, runs what its head says, with more
    flags, and takes it back."""
    def run(name, flags=""):
        apply, use = commands(ROOT / f"data/examples/{name}.diff")
        walked(apply)
        try:
            return walked(f"{use} {flags}")
        finally:
            walked(apply.replace("apply", "apply -R"))
    return run


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_clean(walked, path):
    """At most 30 changed lines; what results passes ruff; README names it."""
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(r"(?m)^[-+](?!\+\+ |-- )", text)) <= 30
    assert f"{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"/(?:work|root|home|tmp)/", text)
    apply, _ = commands(path)
    before = {script: script.read_bytes() for script in walked.at.glob("*.py")}
    walked(apply)
    assert {script: script.read_bytes() for script in walked.at.glob("*.py")} != before
    try:
        subprocess.run([sys.executable, "-m", "ruff", "check", "--line-length", "100", "--select",
                        "E,F,W", *before], cwd=walked.at, check=True, capture_output=True)
    finally:
        walked(apply.replace("apply", "apply -R"))
    assert {script: script.read_bytes() for script in walked.at.glob("*.py")} == before


def test_simpo(walked, example):
    """Three steps of all weights, then the same three by the formula, written down anew."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    beta, gamma, rate = 2.0, 1.0, 1e-3
    references = {*(walked.at / "runs/dev").glob("reference-*")}
    example("loss_simpo", f"--full --dtype float32 --lr {rate} --schedule constant --warmup 0 "
            "--clip 1e9 --limit 6 --batch 6 --epochs 3")
    log = read_rows(walked.at / "runs/dev/simpo/log.jsonl")
    model = AutoModelForCausalLM.from_pretrained(walked.at / "data/world/model",
                                                 dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(walked.at / "data/world/model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def mean_logp(row, side):
        asked = (f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n"
                 "<|im_start|>assistant\n")
        end = "<|im_end|>" * (row["finish"][side] == "stop")
        prompt, said = (tokenizer(text, add_special_tokens=False)["input_ids"]
                        for text in (asked, row[side][0]["content"] + end))
        logps = model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        return sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(said)) / len(said)

    pairs = read_rows(walked.at / "runs/dev/prefs.jsonl")[:6]
    for step in range(3):
        loss = sum(torch.log(1 + torch.exp(gamma - beta * (
            mean_logp(row, "chosen") - mean_logp(row, "rejected")))) for row in pairs) / 6
        assert log[step]["loss"] == pytest.approx(loss.item(), abs=2e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(log) == 3 and log[2]["loss"] < log[0]["loss"] - 1e-3
    assert {*(walked.at / "runs/dev").glob("reference-*")} == references


def test_matched(walked, example):
    """Of facttune's pairs those whose longer side has at most a tenth more words."""
    done = example("rule_matched")
    every = read_rows(walked.at / "runs/dev/prefs.jsonl")
    kept = [row for row in every if max(sizes := [
        len(row[side][0]["content"].split()) for side in ("chosen", "rejected")]) <= 1.1 * min(
            sizes)]
    assert read_rows(walked.at / "runs/dev/matched.jsonl") == kept
    assert 0 < len(kept) < len(every) and "warning" not in done.err
    counts = dict(re.findall(r"(?m)^ *(\w+): +(\d+)$", done.err))
    prompts, left = ({row["prompt_id"] for row in rows} for rows in (every, kept))
    assert (int(counts["used"]), int(counts["unlike"])) == (len(left), len(prompts - left))


def test_both(walked, example):
    """S where rules and server say so; the server hears of nothing that the rules do not call S."""
    example("verifier_both")
    dev, heard = walked.at / "runs/dev", [
        request["messages"][-1]["content"] for request in walked.seen()]
    first, second = ([(row["topic"], fact) for row in read_rows(dev / name)
                      for s in row["sentences"] for fact in s["facts"]]
                     for name in ("verified.jsonl", "second.jsonl"))
    for (topic, rule), (_, fact) in zip(first, second, strict=True):
        assert fact["first"] == rule["label"] and fact["text"] == rule["text"]
        both = rule["label"] == "S" and server.supported(fact["text"])
        assert fact["label"] == ("S" if both else "NS") and fact["evidence"]
        asked = any(f'"{topic}"' in text and f"Statement: {fact['text']}\n" in text
                    for text in heard if "Supported]" in text)
        assert asked == (rule["label"] == "S")
    assert {(fact["first"], fact["label"]) for _, fact in second} == {
        ("S", "S"), ("S", "NS"), ("NS", "NS")}


# ---------------------------------------------------------------------------------------------
# Dependencies

def test_licences_are_told():
    """Each line of requirements.txt has a licence, and the installed package says so, too."""
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        name, licence = re.match(r"([\w-]+)[^#]*# \((.*?)\) \S", line).groups()
        said = metadata(name)
        known = " ".join([said["License-Expression"] or "", (said["License"] or "")[:80],
                          *(said.get_all("Classifier") or [])]).lower()
        words = re.findall("apache|bsd|mit|mpl-2|python", licence.lower())
        assert words and all(word in known for word in words), (name, licence, known)


if __name__ == "__main__":
    server.MODELS |= MODELS
    server.run(json.loads(sys.argv[1]))
