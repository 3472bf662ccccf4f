"""Opt-in: TRL loads every kind of file that 04 writes, unchanged, and takes a step. Left out unless
a Python that has TRL 1.9 and this project's requirements is named; half a minute on a CPU:

    python3 -m venv TRL && TRL/bin/pip install -r requirements.txt trl==1.9.0
    NANOFACT_TRL=TRL/bin/python .venv/bin/python -m pytest -rs tests/test_trl.py
"""
import inspect
import json
import math
import os
import subprocess

import pytest
from conftest import call, read_rows, write_rows
from test_prefs import verified

TRL = os.environ.get("NANOFACT_TRL")
pytestmark = pytest.mark.skipif(not TRL, reason="NANOFACT_TRL, a Python that has TRL, is not set")
RULES = {  # file -> (trainer, rule and flags of 04, kinds of rows)
    "fs": ("DPO", ["facttune", "--pairs", "all"], ["fact"]),
    "mc": ("DPO", ["facttune", "--reward", "max"], ["fact"]),
    "unpaired": ("KTO", ["facttune", "--unpaired"], ["fact"]),
    "sft": ("SFT", ["sft"], ["fact"]),
    "rft": ("SFT", ["rft"], ["fact"]),
    "flame-sft": ("SFT", ["flame-sft", "--given", "given.jsonl"], ["fact", "if"]),
    "flame": ("DPO", ["flame"], ["fact", "if"]),
    "factalign": ("KTO", ["factalign", "--k", "2"], ["fact"]),
    "factalign-more": ("KTO", ["factalign", "--general", "general.jsonl"], ["fact", "general"]),
    "apeft": ("DPO", ["apeft", "--answers", "answers.jsonl"], ["atomic", "fact"]),
    "apeft-kto": ("KTO", ["apeft", "--answers", "answers.jsonl", "--unpaired"], ["atomic", "fact"])}


def make_rows(folder):
    """What 04 reads: 5 prompts with 3 responses each, answers, given targets, general data."""
    rows, answers = [], []
    brief, hi, yes, no = ({"role": role, "content": text} for role, text in (
        ("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hi!"), ("assistant", "No.")))
    known = {"r": 0.5, "known": "potentially", "answers": [
        {"text": text, "label": mark, "count": 1} for text, mark in (("Asia", "S"), ("Oz", "NS"))]}
    for n, land in enumerate(["Fiji", "Peru", "Mali", "Réunion", "Oman"]):
        asked = {"prefix": f"{land} is in"} if n % 2 else {"question": f"Where is {land}?"}
        for k, marks in enumerate((["S", "S"], ["S", "NS"], ["NS", "NS"])):
            row = verified(land, k, [marks, ["S"], []], [
                f"{land} is big, says {k}.", "It has hills – é.", "Well."], topic=land,
                finish=("stop", "length")[k % 2], rating=2.5 + k / 4, fact_based=n != 0)
            row["prompt"] = [brief, hi] if n == 4 else row["prompt"]
            for fact in row["sentences"][0]["facts"]:
                fact |= {**asked, **known, "conf": {"max": k / 3, "exp": 0.5, "neg_ent": -1}}
            rows.append(row)
        answers.append({"id": f"q{n}/0", "prompt_id": f"q{n}", "topic": land, "response": " Asia.",
                        "prompt": asked.get("question", f"State one fact about {land}."), **asked})
    rated = {"id": "g", "prompt": "Hi?", "response": "Hi there.", "finish": "stop", "rating": 4.5}
    write_rows(folder / "in.jsonl", rows)
    write_rows(folder / "answers.jsonl", answers)
    write_rows(folder / "given.jsonl", [rated, {**rated, "id": "h", "prompt": [brief, hi]}])
    write_rows(folder / "general.jsonl", [
        rated, {"id": "mixed", "prompt": [hi], "completion": [no], "label": False},
        {"id": "pair", "prompt": "Hi?", "chosen": [hi, yes], "rejected": [hi, no]}])


def theirs(folder, model, jobs):
    """In TRL's Python, by itself: {file: what TRL makes of its rows, and the loss of a step}."""
    import json
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    found, tokenizer = {}, AutoTokenizer.from_pretrained(model)
    for name, trainer in json.loads(jobs).items():
        rows = load_dataset("json", data_files=f"{folder}/{name}.jsonl", split="train")
        config = getattr(trl, f"{trainer}Config")(
            output_dir=f"{folder}/out", use_cpu=True, bf16=False, max_steps=1, report_to="none",
            save_strategy="no")
        made = getattr(trl, f"{trainer}Trainer")(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"), args=config,
            train_dataset=rows, processing_class=tokenizer)
        loss, texts = made.train().training_loss, []
        for row in made.train_dataset:
            if trainer == "SFT":
                n = row["labels"].count(-100)
                row = {"prompt_ids": row["input_ids"][:n], "completion_ids": row["input_ids"][n:]}
            texts.append({side: tokenizer.decode(row[f"{side}_ids"]) for side in
                          ("prompt", "chosen", "rejected", "completion") if f"{side}_ids" in row}
                         | ({"label": row["label"]} if trainer == "KTO" else {}))
        found[name] = {"texts": texts, "loss": loss}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def taken(tiny_model, tmp_path_factory):
    """{file: (rows that 04 wrote, what TRL made of them)}."""
    folder = tmp_path_factory.mktemp("trl")
    make_rows(folder)
    for name, (_, (rule, *flags), _) in RULES.items():
        flags = [folder / flag if flag.endswith(".jsonl") else flag for flag in flags]
        done = call("04_build_prefs.py", rule, "--in", folder / "in.jsonl", "--out",
                    folder / f"{name}.jsonl", *flags)
        assert done.returncode == 0, done.stderr
    code = inspect.getsource(theirs) + "import sys\ntheirs(*sys.argv[1:])"
    jobs = json.dumps({name: trainer for name, (trainer, *_) in RULES.items()})
    done = subprocess.run([TRL, "-c", code, folder, tiny_model, jobs], text=True,
                          capture_output=True, env={**os.environ, "HF_DATASETS_CACHE": str(folder)})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: (read_rows(folder / f"{name}.jsonl"), found[name]) for name in RULES}


@pytest.mark.parametrize("name", RULES)
def test_trl_trains_on_the_rows_as_they_are(name, taken):
    (rows, found), (trainer, _, kinds) = taken[name], RULES[name]
    right = [{"prompt": "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
                                for m in row["prompt"]) + "<|im_start|>assistant\n",
              **{side: row[side][0]["content"] + "<|im_end|>\n"
                 for side in ("chosen", "rejected", "completion") if side in row},
              **({"label": row["label"]} if trainer == "KTO" else {})} for row in rows]
    assert found["texts"] == right and len(rows) >= 3
    assert {key for row in rows for key in row} == {*rows[0]}  # datasets reads 10 MB for columns
    assert sorted({row["kind"] for row in rows}) == kinds
    start = {"DPO": math.log(2), "KTO": 0.5, "SFT": math.log(259)}[trainer]  # 259 random tokens
    assert found["loss"] == pytest.approx(start, abs=0.2 if trainer == "SFT" else 1e-4)
