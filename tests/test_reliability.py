"""Kills, refusals, locks, bad input, Ctrl-C of 01, 02 and 03 (README, Resuming); 01's sampling.

A stage is killed as a real process: launcher.py, which imports torch once, forks for each run.
"""
import fcntl
import filecmp
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import common
import pytest
import torch
from common import as_messages, load_model, prompt_ids
from conftest import ROOT, call, read_rows, stage, write_rows
from safetensors import SafetensorError

STAGES = ("01_generate", "02_decompose", "03_verify")
HEAVY = ("torch", "transformers", "openai", "datasets", "peft", "matplotlib", "rank_bm25")
SIGMAS = 4
generate = stage("01_generate")
verify = stage("03_verify")


# ---------------------------------------------------------------------------------------------
# Running a stage

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is so small that threads only cost time; forked runs have one as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def launch(*modules):
    """launcher.py with modules that it imports before it forks."""
    with subprocess.Popen([sys.executable, "tests/launcher.py", *modules], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def launcher():
    with launch() as process:
        yield process


def start(launcher, argv, operations=0, out=None, what=signal.SIGKILL, **more):
    """Fork a run of a stage; operations = n kills it before its n-th file operation on OUT, or does
    something else to it (launcher.py). out: OUT, where no --out tells."""
    out = str(out or argv[argv.index("--out") + 1])
    job = {"argv": list(map(str, argv)), "out": out, "operations": operations, "calls": 0,
           "signal": int(what), "bytes": 0, "torn": False, "bound": False,
           "stdout": f"{out}-stdout", "stderr": f"{out}-stderr", **more}
    launcher.stdin.write(json.dumps(job) + "\n")
    launcher.stdin.flush()
    return int(launcher.stdout.readline())


def finish(launcher):
    return int(launcher.stdout.readline())


def signal_at_size(pid, out, size, what):
    """Watch OUT grow, and send the process group a signal once it holds `size` bytes."""
    try:
        while not out.exists() or out.stat().st_size < size:
            os.kill(pid, 0)
        os.killpg(pid, what)
    except ProcessLookupError:  # it was done before
        pass


def here(script, *args, module=None):
    """A stage in this process: (exit code, stdout, stderr). A traceback fails the test.
    module: the stage, where it is loaded already."""
    module = module or stage(script)
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with (mock.patch.object(sys, "argv", [f"{script}.py", *map(str, args)]),
          redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end):
        module.run(module.main)
    return end.value.code, out.buffer.getvalue().decode(), err.getvalue()


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------
# A small world: 60 lands, their corpus, and what 01, 02 and 03 make of it undisturbed

LANDS = [f"{a}{b}" for a in ("Bar", "Dol", "Fen", "Gor", "Hul", "Kam") for b in
         ("avia", "etia", "ilia", "onia", "uria", "aland", "estan", "island", "osia", "unda")]
TEXT = "{0} is a country in Africa. Its capital is New {0}. It borders {1} and {2}.\u2028So be it."


def prompt_rows(n, size=0):
    return [{"id": land.lower(), "topic": land, "prompt": f"Tell me {'all ' * (i % 5)}of {land}.",
             "note": "\u00e9" * size} for i, land in enumerate(LANDS[:n])]


def sample_rows(n, size=0):
    return [{"id": f"{land.lower()}/{k}", "prompt_id": land.lower(), "topic": land,
             "response": TEXT.format(land, *random.Random(f"{land}{k}").sample(LANDS, 2)),
             "finish": ("stop", "length")[k % 2], "note": "\u00e9" * size}
            for k in range(math.ceil(n / len(LANDS))) for land in LANDS][:n]


def corpus_rows(lands=LANDS):
    borders = "total: 900 km; border countries (2): {} 400 km; {} 500 km"
    return [{"title": land, "field": field, "text": text} for i, land in enumerate(lands)
            for field, text in (("Capital", f"name: New {land}"), ("Location", "Western Africa"),
                                ("Land boundaries", borders.format(LANDS[i - 1], LANDS[i - 2])))]


@pytest.fixture(scope="module")
def lively(tiny_model, tmp_path_factory):
    """The tiny model with larger weights: it looks back at the prompt, and ends some turns."""
    model, tokenizer, _ = load_model(str(tiny_model), dtype="float32", device="cpu")
    with torch.inference_mode():
        for name, weights in model.named_parameters():
            weights.mul_(1 if "norm" in name else 10)
        model.model.embed_tokens.weight[tokenizer.eos_token_id].mul_(2)
    folder = tmp_path_factory.mktemp("lively")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(lively, tmp_path_factory):
    """rows(script, n, size) and flags(script, folder, input) of a run in the small world."""
    folder = tmp_path_factory.mktemp("world")
    corpus = write_rows(folder / "corpus.jsonl", corpus_rows())
    decompose = stage("02_decompose").decompose

    def rows(script, n, size=0):
        if script == "01_generate":
            return prompt_rows(n, size)
        samples = sample_rows(n, size)
        return samples if script == "02_decompose" else list(map(decompose, samples))

    def flags(script, inp, out):
        return {"01_generate": ["--prompts", inp, "--out", out, "--model", lively, "--n", 2,
                                "--batch", 8, "--max-new-tokens", 48, "--device", "cpu"],
                "02_decompose": ["--in", inp, "--out", out],
                "03_verify": ["--in", inp, "--out", out, "--corpus", corpus]}[script]

    return rows, flags


def prepare(world, script, folder, n, size=0):
    """(rows, input file, OUT, flags) of a run in `folder`."""
    rows, flags = world
    inp = write_rows(folder / "in.jsonl", rows(script, n, size))
    return read_rows(inp), inp, folder / "out.jsonl", flags(script, inp, folder / "out.jsonl")


# ---------------------------------------------------------------------------------------------
# (a) kill -9

# Fat rows (a field of 200 KB that is only carried along) make writing slow enough to be torn.
@pytest.mark.parametrize("script, n, size", [
    ("01_generate", 40, 1000), ("02_decompose", 600, 1000), ("03_verify", 240, 1000),
    ("02_decompose", 24, 100_000)])
def test_ten_kills_leave_no_trace(script, n, size, world, launcher, tmp_path):
    _, _, out, flags = prepare(world, script, tmp_path, n, size)
    argv = [f"{script}.py", *flags]
    start(launcher, argv)
    assert finish(launcher) == 0
    whole = out.rename(tmp_path / "undisturbed.jsonl")
    Path(f"{out}.args.json").unlink()
    everything, dice, killed = whole.read_bytes(), random.Random(script), 0
    for left in range(10, 0, -1):
        there = out.stat().st_size if out.exists() else 0
        pid = start(launcher, argv)
        target = there + int(dice.random() * 2 * (len(everything) - there) / (left + 1))
        signal_at_size(pid, out, target, signal.SIGKILL)
        killed += finish(launcher) == -signal.SIGKILL
        assert everything.startswith(out.read_bytes())
    assert killed >= 5  # else this machine is too busy to watch a file grow
    start(launcher, argv)
    assert finish(launcher) == 0
    assert filecmp.cmp(out, whole, shallow=False)


@pytest.mark.parametrize("before", ["nothing", "other flags", "fewer rows"])
@pytest.mark.parametrize("script", STAGES)
def test_killed_before_any_file_operation(script, before, world, launcher, tmp_path):
    """A kill before the first, second, ... open, rename or removal on OUT and the files beside it,
    until a run comes through: between OUT and OUT.args.json, too."""
    rows, inp, out, flags = prepare(world, script, tmp_path, 4)
    argv = [f"{script}.py", *flags, *(["--overwrite"] if before == "other flags" else [])]

    def before_it():
        for path in tmp_path.glob("out.jsonl*"):
            path.unlink()
        write_rows(inp, rows[:2] if before == "fewer rows" else rows)
        if before != "nothing":
            start(launcher, argv + (["--seed", 5] if before == "other flags" else []))
            assert finish(launcher) == 0
        write_rows(inp, rows)

    before_it()
    start(launcher, argv)
    assert finish(launcher) == 0
    whole = out.read_bytes()
    for operation in range(1, 20):
        before_it()
        start(launcher, argv, operation)
        code = finish(launcher)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        start(launcher, argv)
        assert (finish(launcher), Path(f"{out}-stderr").read_text()[:3]) == (0, "---"), operation
        assert out.read_bytes() == whole
    assert operation > 3


@pytest.mark.parametrize("script", STAGES)
def test_torn_file_is_mended(script, world, tmp_path):
    """Cut anywhere, also inside a character: what a kill can leave, made by hand."""
    _, _, out, flags = prepare(world, script, tmp_path, 4)
    assert here(script, *flags)[0] == 0
    whole = out.read_bytes()
    lines = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    inside = [i for i, byte in enumerate(whole) if byte & 0xC0 == 0x80]  # of a UTF-8 character
    cuts = {0, 1, lines[0], lines[1], lines[1] - 1, len(whole) - 1, inside[0], inside[-1]}
    for cut in sorted(cuts | set(random.Random(script).sample(range(len(whole)), 8))):
        out.write_bytes(whole[:cut])
        assert here(script, *flags)[0] == 0
        assert out.read_bytes() == whole, cut
    out.write_bytes(whole + b'{"id": "torn')
    assert here(script, *flags)[0] == 0
    assert out.read_bytes() == whole


def test_torn_file_in_the_real_world(tmp_path):
    corpus = ROOT / "data/world/countries.jsonl"
    assert corpus.exists(), "python data/prepare.py"
    text = "Chad borders Libya. Its capital is N'Djamena. It has 40 million people."
    samples = write_rows(tmp_path / "s.jsonl", [
        {"id": f"chad/{k}", "topic": "Chad", "response": text} for k in range(9)])
    facts, out = tmp_path / "f.jsonl", tmp_path / "v.jsonl"
    assert here("02_decompose", "--in", samples, "--out", facts)[0] == 0
    assert here("03_verify", "--in", facts, "--out", out, "--corpus", corpus)[0] == 0
    labels = [fact["label"] for s in read_rows(out)[8]["sentences"] for fact in s["facts"]]
    assert labels == ["S", "S", "NS"]
    whole = out.read_bytes()
    out.write_bytes(whole[:len(whole) // 2])
    assert here("03_verify", "--in", facts, "--out", out, "--corpus", corpus)[0] == 0
    assert out.read_bytes() == whole


def test_rows_are_there_at_once_and_failures_aside(tmp_path):
    """common.output by itself: each row is flushed, a failed row is no data, and comes again."""
    rows, out = [{"id": "a"}, {"id": "b"}], tmp_path / "new" / "out.jsonl"
    args = SimpleNamespace(inp="x", out=str(out), limit=None, overwrite=False, seed=0)
    with common.output(args, rows) as (done, write, fail):
        assert done == {}
        write(rows[0])
        assert out.read_text() == '{"id": "a"}\n'
        fail(rows[1], "time-out")
    assert read_rows(f"{out}.failed") == [{"id": "b", "error": "time-out"}]
    before = snapshot(tmp_path)
    args.overwrite = True
    with mock.patch.object(os, "replace", side_effect=InterruptedError), \
            pytest.raises(InterruptedError), common.output(args, rows):
        pass  # killed before OUT.args.json is renamed: the old one must be whole
    assert before[Path(f"{out}.args.json")] == Path(f"{out}.args.json").read_bytes()
    args.overwrite = False
    out.write_bytes(before[out])
    with common.output(args, rows) as (done, write, fail):
        assert list(done) == ["a"] and not Path(f"{out}.failed").exists()


# ---------------------------------------------------------------------------------------------
# (b) Bad input: one line with file:line, exit 2, nothing touched

def without(row, field):
    return {k: v for k, v in row.items() if k != field}


def as_lines(*rows):
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


def refused(script, flags, path, line=None, said=()):
    """The contract of an error: exit 2, one line, no traceback; files are as they were."""
    before = snapshot(path.parent)
    code, stdout, err = here(script, *flags)
    assert (code, stdout, err.count("\n")) == (2, "", 1), err
    assert snapshot(path.parent) == before
    for part in (f"{path}:{line}: expected " if line else str(path), *said):
        assert part in err, err
    return err


FIELDS = {"01_generate": ["prompt"], "02_decompose": ["response", "topic"],
          "03_verify": ["sentences", "topic"]}
BROKEN = {  # name: lines from three good rows, number of the bad one
    "invalid JSON": lambda a, b, c, field: (as_lines(a, '{"id": "b", ', c), 2),
    "missing field": lambda a, b, c, field: (as_lines(a, b, without(c, field)), 3),
    "wrong type": lambda a, b, c, field: (as_lines(a, {**b, field: 7}, c), 2),
    "null": lambda a, b, c, field: (as_lines({**a, field: None}, b, c), 1),
    "duplicate id": lambda a, b, c, field: (as_lines(a, "", b, {**c, "id": a["id"]}), 4),
    "id no string": lambda a, b, c, field: (as_lines(a, b, {**c, "id": ["c"]}), 3),
    "non-object": lambda a, b, c, field: (as_lines(a, '["b"]', c), 2),
    "endless number": lambda a, b, c, field: (as_lines(a, f'{{"id": {"9" * 5000}}}'), 2),
    "deep nesting": lambda a, b, c, field: (as_lines(a, "[" * 100_000), 2),
    "half a character": lambda a, b, c, field: (as_lines(a, {**b, "note": "\ud83d"}), 2),
    "empty file": lambda a, b, c, field: ("", None),
    "blank lines": lambda a, b, c, field: ("\n \n", None),
}


@pytest.mark.parametrize("script, field", [(s, f) for s in STAGES for f in FIELDS[s]])
@pytest.mark.parametrize("broken", BROKEN)
def test_bad_input(script, field, broken, world, tmp_path):
    rows, inp, out, flags = prepare(world, script, tmp_path, 3)
    text, line = BROKEN[broken](*rows, field)
    inp.write_text(text, encoding="utf-8")
    for there in (False, True):
        if there:
            out.write_text(as_lines(*rows), encoding="utf-8")
            Path(f"{out}.args.json").write_text("{}", encoding="utf-8")
        refused(script, flags, inp, line, ["found "])


@pytest.mark.parametrize("script", STAGES)
def test_missing_file(script, world, tmp_path):
    _, inp, out, flags = prepare(world, script, tmp_path, 3)
    inp.unlink()
    refused(script, flags, inp, None, ["no such file"])
    if script == "03_verify":
        prepare(world, script, tmp_path, 3)
        gone = tmp_path / "gone.jsonl"
        refused(script, [*flags, "--corpus", gone], gone, None, ["no such file", "prepare.py"])


# Types of the parts: a traceback in the middle of a run is no way to learn of them.
DEEP = [("01_generate", "prompt", value) for value in (
            [], [7], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}],
            [{"role": "x<|im_end|>", "content": "x"}])]
DEEP += [("01_generate", "prefix", 7)]
DEEP += [("03_verify", "sentences", value) for value in (
             [7], [{"text": "x"}], [{"text": "x", "facts": None}], [{"text": "x", "facts": [7]}],
             [{"text": "x", "facts": [{}]}], [{"text": "x", "facts": [{"text": None}]}])]


@pytest.mark.parametrize("script, field, value", DEEP)
def test_bad_parts_of_a_field(script, field, value, world, tmp_path):
    rows, inp, out, flags = prepare(world, script, tmp_path, 3)
    write_rows(inp, [rows[0], {**rows[1], field: value}])
    refused(script, flags, inp, 2, ["found "])


@pytest.mark.parametrize("script", STAGES)
@pytest.mark.parametrize("limit", [0, -1])
def test_bad_limit(script, limit, world, tmp_path):
    """A negative limit would drop the last rows, 0 would divide by it."""
    *_, flags = prepare(world, script, tmp_path, 3)
    before = snapshot(tmp_path)
    code, _, err = here(script, *flags, "--limit", limit)
    assert code == 2 and "--limit" in err and snapshot(tmp_path) == before


@pytest.mark.parametrize("script", STAGES)
def test_input_is_never_the_output(script, world, tmp_path):
    _, inp, _, flags = prepare(world, script, tmp_path, 3)
    refused(script, [*flags, "--out", inp, "--overwrite"], inp)
    refused(script, [*flags, "--out", tmp_path / "." / "in.jsonl", "--overwrite"], inp)


# ---------------------------------------------------------------------------------------------
# (c) Other flags, other rows; more rows, --limit, --overwrite

CHANGED = [("01_generate", flag, value) for flag, value in (
               ("--temperature", .5), ("--top-p", .5), ("--top-k", 9), ("--max-new-tokens", 9),
               ("--n", 3), ("--seed", 1), ("--batch", 4), ("--dtype", "float32"),
               ("--adapter", "x"), ("--model", "x"))]
CHANGED += [("02_decompose", "--seed", 1), ("03_verify", "--seed", 1), ("03_verify", "--top", 5),
            ("03_verify", "--open-search", None)]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """{script: (rows, input, OUT, flags)} of finished runs over six rows; tests leave them be."""
    made = {script: prepare(world, script, tmp_path_factory.mktemp(script), 6) for script in STAGES}
    for script, (*_, flags) in made.items():
        assert here(script, *flags)[0] == 0
    return made


@pytest.mark.parametrize("script, flag, value", CHANGED)
def test_other_flags_are_refused(script, flag, value, finished):
    _, _, out, flags = finished[script]
    more = [flag] if value is None else [flag, value]
    refused(script, [*flags, *more], out, None, [f"{flag} ", "--overwrite"])


@pytest.mark.parametrize("script", STAGES)
def test_same_flags_again_change_nothing(script, finished):
    _, inp, out, flags = finished[script]
    before = snapshot(inp.parent)
    code, _, err = here(script, *flags)
    assert code == 0 and snapshot(inp.parent) == before


@pytest.mark.parametrize("script", STAGES)
def test_other_rows_are_refused(script, finished):
    rows, inp, out, flags = finished[script]
    others = {"edited": [{**rows[0], "topic": "Elsewhere"}, *rows[1:]], "fewer": rows[:-1],
              "reordered": [rows[1], rows[0], *rows[2:]],
              "put before": [{**rows[0], "id": "a"}, *rows]}
    for other in others.values():
        write_rows(inp, other)
        refused(script, flags, out, None, [str(inp), "--overwrite"])
    write_rows(inp, rows)


@pytest.mark.parametrize("script", STAGES)
def test_file_of_others_is_not_touched(script, world, tmp_path):
    _, _, out, flags = prepare(world, script, tmp_path, 3)
    out.write_text("my notes\n", encoding="utf-8")
    refused(script, flags, out, None, ["--overwrite"])


@pytest.mark.parametrize("script", STAGES)
def test_grown_input_and_limit_resume(script, world, tmp_path):
    rows, inp, out, flags = prepare(world, script, tmp_path, 6)
    assert here(script, *flags)[0] == 0
    fresh = out.read_bytes()
    per_row = 2 if script == "01_generate" else 1

    def only_adds(*more):
        before = out.read_bytes()
        code, _, err = here(script, *flags, *more)
        assert code == 0 and out.read_bytes().startswith(before)
        names = [row["id"] for row in read_rows(out)]
        assert len(names) == len(set(names))
        return names

    for path in tmp_path.glob("out.jsonl*"):
        path.unlink()
    write_rows(inp, rows[:4])
    here(script, *flags, "--limit", 3)
    assert len(read_rows(out)) == 3 * per_row
    assert len(only_adds()) == 4 * per_row
    write_rows(inp, rows)
    assert len(only_adds("--limit", 5)) == 5 * per_row
    names = only_adds()
    assert only_adds("--limit", 2) == names and len(names) == 6 * per_row
    if script == "01_generate":  # its batches are cut by length from all rows at hand
        assert set(names) == {f"{row['id']}/{k}" for row in rows for k in range(2)}
    else:
        assert out.read_bytes() == fresh
    assert here(script, *flags, "--overwrite")[0] == 0
    assert out.read_bytes() == fresh


# ---------------------------------------------------------------------------------------------
# (d) One writer at a time

@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--limit", 2], ["--retry-null"]])
@pytest.mark.parametrize("script", STAGES)
def test_second_writer_is_refused(script, more, finished):
    if "--retry-null" in more and script != "03_verify":
        return
    _, _, out, flags = finished[script]
    with open(out, "ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        refused(script, [*flags, *more], out, None, ["another process"])
    assert here(script, *flags)[0] == 0  # and the lock goes with its holder


# ---------------------------------------------------------------------------------------------
# (e) 03: facts that could not be judged

@pytest.fixture
def unjudged(world, tmp_path):
    """A finished 03 whose second topic had no page: (flags, OUT, corpus, its bytes)."""
    rows, inp, out, flags = prepare(world, "03_verify", tmp_path, 3)
    corpus = write_rows(tmp_path / "corpus.jsonl", corpus_rows(LANDS[:1] + LANDS[2:]))
    flags = [*flags, "--corpus", corpus]
    code, said, err = here("03_verify", *flags)
    labels = [[f["label"] for s in row["sentences"] for f in s["facts"]] for row in read_rows(out)]
    assert set(labels[1]) == {None} and None not in labels[0] + labels[2]
    assert code == 1 and LANDS[1] in said and LANDS[0] not in said
    assert f"unjudged:         {len(labels[1])}\n" in err
    return flags, out, corpus, out.read_bytes()


def test_null_stays_until_it_is_retried(unjudged):
    flags, out, corpus, before = unjudged
    assert here("03_verify", *flags)[0] == 1  # done, but never well
    assert out.read_bytes() == before
    assert here("03_verify", *flags, "--retry-null")[0] == 1  # judged again, with the same result
    assert sorted(read_rows(out), key=str) == sorted(map(json.loads, before.splitlines()), key=str)


def test_retry_null_judges_once_the_page_is_there(unjudged, tmp_path):
    flags, out, corpus, before = unjudged
    write_rows(corpus, corpus_rows(LANDS[:1] + LANDS[2:]) + [
        row for row in corpus_rows() if row["title"] == LANDS[1]])
    code, said, err = here("03_verify", *flags, "--retry-null")
    assert (code, said) == (0, "") and "unjudged:         0\n" in err
    fresh = tmp_path / "fresh.jsonl"
    assert here("03_verify", *flags, "--out", fresh)[0] == 0
    assert sorted(read_rows(out), key=str) == sorted(read_rows(fresh), key=str)
    assert set(before.splitlines(True)) & set(out.read_bytes().splitlines(True))  # kept as it was
    assert here("03_verify", *flags)[0] == 0


def test_retry_null_is_refused_like_any_run(unjudged):
    flags, out, corpus, before = unjudged
    refused("03_verify", [*flags, "--retry-null", "--top", 5], out, None, ["--top 3 -> 5"])
    with open(out, "ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        refused("03_verify", [*flags, "--retry-null"], out, None, ["another process"])
    Path(f"{out}.args.json").unlink()
    refused("03_verify", [*flags, "--retry-null"], out, None, ["--overwrite"])


def test_one_file_holds_the_verdicts_of_one_corpus(unjudged, tmp_path):
    """The path of a corpus may change, what it says may not."""
    flags, out, corpus, before = unjudged
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(corpus.read_bytes())
    assert here("03_verify", *flags, "--corpus", moved)[0] == 1
    assert out.read_bytes() == before
    write_rows(corpus, corpus_rows(LANDS[2:]))
    refused("03_verify", flags, out, None, ["--corpus"])


@pytest.mark.parametrize("topic", ["A\\1", "\\", "C++ (lang", "[x", "a|b", "$", "{0}"])
def test_topic_is_text_and_no_pattern(topic, tmp_path):
    """Neither one to search for, nor one to put in."""
    row = {"response": "It is a large country. They speak.", "topic": topic, "finish": "stop"}
    found = stage("02_decompose").decompose(row)["sentences"][0]["facts"]
    assert found and all(topic in fact["text"] for fact in found)
    page = write_rows(tmp_path / "page.jsonl", [{"title": topic, "text": "It is a large country."}])
    corpus = {**verify.corpus.open_corpus(page), "open": {}}
    read = verify.open_page(topic, "", corpus, False)
    found = verify.lexical(found[0]["text"], topic, read, corpus, SimpleNamespace(top=2), None)
    assert found["label"] in ("S", "NS", "IR")


# ---------------------------------------------------------------------------------------------
# (f) Ctrl-C, (g) --help, and what stands on stderr

def test_a_reader_that_has_seen_enough(tmp_path):
    """`| head`: no traceback."""
    rows = write_rows(tmp_path / "rows.jsonl", [
        {"id": "a", "response": "b", "sentences": [{"facts": [{"text": "c", "label": "S"}]}]}])
    process = subprocess.Popen([sys.executable, "06_eval.py", "score", "--in", rows], cwd=ROOT,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert "Error" not in process.stderr.read() and process.wait() == 141


@pytest.mark.parametrize("script, n", [*zip(STAGES, (40, 600, 240))])
def test_ctrl_c(script, n, world, launcher, tmp_path):
    _, _, out, flags = prepare(world, script, tmp_path, n)
    argv = [f"{script}.py", *flags]
    signal_at_size(start(launcher, argv), out, 1, signal.SIGINT)
    assert finish(launcher) == 130
    assert Path(f"{out}-stderr").read_text() == "\ninterrupted; the same command resumes\n"
    torn = out.read_bytes()
    assert torn.endswith(b"\n") and 0 < len(read_rows(out)) < n
    start(launcher, argv)
    assert finish(launcher) == 0
    assert out.read_bytes().startswith(torn) and len(read_rows(out)) >= n


@pytest.mark.parametrize("script", sorted(path.stem for path in ROOT.glob("[0-9][0-9]_*.py")))
def test_help_is_instant_and_light(script):
    seconds = []
    while not seconds or (min(seconds) >= .5 and len(seconds) < 8):  # a busy machine may try again
        began = time.perf_counter()
        done = call(f"{script}.py", "--help")
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0 and done.stdout.startswith("usage:") and not done.stderr
    assert min(seconds) < .5
    code = (f"import runpy, sys\nsys.argv = ['{script}.py', '--help']\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            f"finally:\n    print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("script", STAGES)
def test_cold_run_prints_the_block_and_nothing_else(script, finished, tmp_path):
    """As a user runs it; not a terminal, so no progress bar. The bytes are those of the fork."""
    _, _, out, flags = finished[script]
    again = tmp_path / "again.jsonl"
    done = call(f"{script}.py", *flags, "--out", again,
                env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, *block = done.stderr.splitlines()
    assert (done.returncode, done.stdout, first) == (0, "", "---")
    assert all(line.partition(":")[0].isidentifier() for line in block), block
    assert filecmp.cmp(again, out, shallow=False)
    assert {path.name for path in tmp_path.iterdir()} == {"again.jsonl", "again.jsonl.args.json"}


# ---------------------------------------------------------------------------------------------
# (h) 01: the sampling

@pytest.fixture(scope="module")
def plain(lively):
    model, tokenizer, _ = load_model(str(lively), dtype="float32", device="cpu")
    return model, tokenizer


def naive_greedy(model, tokenizer, ids, budget):
    """The whole sequence through the whole model for each token; no cache, no batch, no padding."""
    said = []
    while len(said) < budget:
        token = int(model(input_ids=torch.tensor([[*ids, *said]])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return said, "stop"
        said.append(token)
    return said, "length"


MIXED = ["Hi", "What is Chad?", "State facts about the country Peru, please.", "x" * 200, "x" * 39,
         [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"},
          {"role": "assistant", "content": "Me."}, {"role": "user", "content": "Why?"}]]


def test_greedy_is_the_naive_loop(plain, lively, tmp_path):
    """Prompts of 1 to 200 letters in one batch, padded on the left: each as if it were alone."""
    model, tokenizer = plain
    rows = [{"id": f"p{i}", "prompt": prompt} for i, prompt in enumerate(MIXED)]
    rows += [{"id": "prefixed", "prompt": "Who is Ada?", "prefix": "Ada was born in"},
             {"id": "unprefixed", "prompt": "Who is Ada?"}]
    inp, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "s.jsonl"
    code, _, err = here("01_generate", "--prompts", inp, "--out", out, "--model", lively,
                        "--device", "cpu", "--dtype", "float32", "--n", 1, "--temperature", 0,
                        "--max-new-tokens", 40)
    got = {row["prompt_id"]: row for row in read_rows(out)}
    tokens = finishes = 0
    for row in rows:
        ids = prompt_ids(tokenizer, as_messages(row["prompt"]), row.get("prefix", ""))
        with torch.inference_mode():
            said, finish = naive_greedy(model, tokenizer, ids, 40)
        mine = got[row["id"]]
        assert mine["response"] == tokenizer.decode(said) and mine["finish"] == finish
        assert mine["id"] == f"{row['id']}/0" and {**mine, **row, "id": 0} == {**mine, "id": 0}
        tokens, finishes = tokens + len(said), finishes + (finish == "length")
    assert 0 < finishes < len(rows)  # both ends are met here
    assert got["prefixed"]["response"] != got["unprefixed"]["response"]
    assert f"tokens:           {tokens}\n" in err and f"{finishes / len(rows):.1%}" in err


def test_padding_moves_no_position():
    """With learned positions a prompt must begin at 0, wherever its row is padded to."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2,
                        initializer_range=1.0, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    prompts = [[5, 6, 7], list(range(10, 40)), [9]]
    with torch.inference_mode():
        said = generate.sample_batch(model, prompts, 2, (0, 1.0, 0), 12, {1}, 0, seed=0)
        for i, ids in enumerate(prompts):
            alone = naive_greedy(model, SimpleNamespace(eos_token_id=1), ids, 12)
            assert said[2 * i] == said[2 * i + 1] == alone


def test_prefix_is_put_in_the_assistants_mouth(plain):
    _, tokenizer = plain
    ids = prompt_ids(tokenizer, as_messages("Who is Ada?"), "Ada was born in")
    assert tokenizer.decode(ids) == ("<|im_start|>user\nWho is Ada?<|im_end|>\n"
                                     "<|im_start|>assistant\nAda was born in")


def test_seed_decides(finished, tmp_path):
    _, _, out, flags = finished["01_generate"]
    other = tmp_path / "other.jsonl"
    assert here("01_generate", *flags, "--out", other, "--seed", 1)[0] == 0
    first, second = read_rows(out), read_rows(other)
    assert [row["id"] for row in first] == [row["id"] for row in second]
    texts = [row["response"] for row in first]
    assert sum(a != b["response"] for a, b in zip(texts, second)) >= 10 <= len(set(texts))
    assert len(texts) == 12
    assert {row["gen"]["seed"] for row in second} == {1}


def test_rows_are_prompts_times_n(finished):
    rows, _, out, flags = finished["01_generate"]
    names = [row["id"] for row in read_rows(out)]
    assert sorted(names) == sorted(f"{row['id']}/{k}" for row in rows for k in range(2))
    for members in (generate.plan_batches([3, 1, 2, 1, 9], n, batch)
                    for n in (1, 2, 7) for batch in (1, 4, 64)):
        assert sum(members, []) == [1, 3, 2, 0, 4]  # by length, each once
    assert generate.plan_batches([3, 1, 2, 1, 9], 2, 4) == [[1, 3], [2, 0], [4]]


def near(count, draws, p):
    return abs(count - draws * p) <= SIGMAS * math.sqrt(draws * p * (1 - p)) + 1e-9


@pytest.mark.parametrize("sharp, wide", [(4, 0), (1.5, 3), (.5, 6)])
def test_nucleus_by_brute_force(sharp, wide):
    """The likeliest one by one, of equals the first, until the mass is there; also where these are
    more than the 1024 that are looked at first. Values as coarse as bf16's: many are equal."""
    scores = torch.randn(6, 4000, generator=torch.Generator().manual_seed(2)) * sharp
    scores[:3] *= 2
    probs = scores.bfloat16().double().softmax(-1)
    kept = generate.nucleus(probs, .9)
    for row, found in zip(probs.tolist(), kept.tolist()):
        right, mass = [0.0] * len(row), 0.0
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
            if mass >= .9:
                break
            right[i], mass = row[i], mass + row[i]
        assert found == right
    assert ((kept > 0).sum(-1) > 1024).sum() == wide


def draw(probs, temperature=1.0, top_p=1.0, top_k=0, draws=2000):
    logits = torch.tensor(probs).log().expand(draws, -1)
    ids = generate.next_tokens(logits, temperature, top_p, top_k, torch.Generator().manual_seed(1))
    return torch.bincount(ids, minlength=len(probs)).tolist()


@pytest.mark.parametrize("filters, expected", [
    ({}, [.15, .5, .05, .3]),
    ({"top_p": .7}, [0, .625, 0, .375]),                # .5 < .7 <= .8: two tokens
    ({"top_p": .81}, [.15 / .95, .5 / .95, 0, .3 / .95]),
    ({"top_p": 1e-6}, [0, 1, 0, 0]),                    # the first token always stays
    ({"top_k": 2}, [0, .625, 0, .375]),
    ({"top_k": 1}, [0, 1, 0, 0]), ({"top_k": 9}, [.15, .5, .05, .3]),
    ({"top_k": 2, "top_p": .6}, [0, 1, 0, 0]),          # k first: .625 is a nucleus then
    ({"temperature": .5}, [.0225 / .365, .25 / .365, .0025 / .365, .09 / .365]),
    ({"temperature": .5, "top_p": .9}, [0, .25 / .34, 0, .09 / .34]),  # heated before it is cut
    ({"temperature": 0}, [0, 1, 0, 0])])
def test_filters_on_hand_made_logits(filters, expected):
    for count, p in zip(draw([.15, .5, .05, .3], **filters), expected):
        assert near(count, 2000, p) and (p > 0 or count == 0)


def test_filters_are_those_of_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = 2 * torch.randn(3, 40, generator=torch.Generator().manual_seed(3))
    for temperature, top_k, top_p in ((.8, 0, .95), (1.3, 12, .7), (.7, 5, .99)):
        theirs = TemperatureLogitsWarper(temperature)(None, logits)
        theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
        theirs = TopPLogitsWarper(top_p)(None, theirs).softmax(-1)
        dice = torch.Generator().manual_seed(4)
        ids = torch.stack([generate.next_tokens(logits, temperature, top_p, top_k, dice)
                           for _ in range(1000)])
        for row in range(3):
            counts = torch.bincount(ids[:, row], minlength=40).tolist()
            assert all(near(n, 1000, p) and (n == 0 or p > 0)
                       for n, p in zip(counts, theirs[row].tolist()))


def test_draws_follow_the_softmax(plain):
    """4,000 responses share each prompt's cache. Their first tokens follow softmax(logits); the
    second tokens after a given first one follow what the plain model says of prompt + first."""
    model, tokenizer = plain
    prompts = [prompt_ids(tokenizer, as_messages(text)) for text in ("Hi", "Tell me of Peru.")]
    draws, likeliest = 4000, 5
    with torch.inference_mode():
        said = generate.sample_batch(model, prompts, draws, (.6, 1.0, 0), 2, set(), 0, seed=7)
        for i, ids in enumerate(prompts):
            mine = [tokens for tokens, _ in said[i * draws:(i + 1) * draws]]
            first = Counter(tokens[0] for tokens in mine).most_common(1)[0][0]
            for before, seen in (([], [t[0] for t in mine]),
                                 ([first], [t[1] for t in mine if t[0] == first])):
                logits = model(input_ids=torch.tensor([ids + before])).logits[0, -1]
                p, tokens = (logits / .6).softmax(-1).topk(likeliest)
                for token, share in zip(tokens.tolist(), p.tolist()):
                    assert near(seen.count(token), len(seen), share), (i, before, token)
    assert [len(tokens) for tokens, _ in said] == [2] * 2 * draws


@pytest.mark.parametrize("where", ["tiny", "real"])
def test_markup_in_text_is_only_text(where, plain):
    """No special token, spelled out in a prompt or in a role, closes a turn or opens another."""
    tokenizer = plain[1]
    if where == "real":
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/world/model")
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def specials(text, prefix="", role="user"):
        ids = prompt_ids(tokenizer, [{"role": role, "content": text}], prefix)
        return [i for i in ids if i in special]

    honest = specials("Who?")
    for text in special.values():
        for evil in (text, f"x{text}\n{text}", text[0] + text, text * 2,
                     text[:3] + text + text[3:]):
            assert specials(evil) == specials("Who?", prefix=evil) == honest, evil


# ---------------------------------------------------------------------------------------------
# What is no fault of ours is one line

@pytest.mark.parametrize("error, code, said", [
    (ModuleNotFoundError("No module named 'torch'"), 2, "'torch': . .venv/bin/activate first"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "a smaller --microbatch of 05"),
    (SafetensorError("I/O error: no room"), 2, "weights that cannot be read or written: I/O error"),
    (PermissionError("no"), 2, "no"), (ValueError("ours"), 70, "Traceback")])
def test_whose_fault_it_is(error, code, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        common.run(mock.Mock(side_effect=error))
    err = capsys.readouterr().err
    assert stopped.value.code == code and said in err and (err.count("\n") == 1) == (code == 2)


@pytest.mark.parametrize("script", ["02_decompose", "06_eval"])
def test_a_flag_is_said_in_full(script, tmp_path):
    """`--ov` once was --overwrite, and a file of the user's own was gone."""
    (notes := tmp_path / "notes.txt").write_text("mine")
    flags = {"02_decompose": ["--in", notes, "--out", notes, "--ov"],
             "06_eval": ["compare", f"base={notes}", "--out-m", notes]}
    done = call(f"{script}.py", *flags[script])
    assert done.returncode == 2 and "arguments: --o" in done.stderr
    assert notes.read_text() == "mine"
