"""A stage is disturbed at a moment drawn by lot; the same command then ends with the files of a run
that nobody disturbed. What cannot go on says so in a line, and leaves what was there.

`make test` has 12 trials, `make chaos` 200. Trial n is drawn from n alone, so it comes again:
NANOFACT_CHAOS=200 .venv/bin/python -m pytest "tests/test_chaos.py::test_trial[137]"
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_reliability as reliability
from conftest import call, read_rows, write_rows
from server import serve

one_thread = reliability.one_thread  # a fixture
TRIALS = int(os.environ.get("NANOFACT_CHAOS", 12))
LANDS = reliability.LANDS
PAGE = 4096  # bytes, of which a disk is made
HEAVY = ("openai", "matplotlib.pyplot", "peft", "accelerate", "rank_bm25", "torch._dynamo")
CANNOT = re.compile("Permission denied|No space left on device|File too large|cannot be written|"
                    "unable to open|readonly database|disk is full|disk I/O error")  # SQLite's
ASKS = "--base-url URL --cache OUT/replies.sqlite --model"
# {name: (command, exit status)}. The server answers nothing about one land: 1
JOBS = {
    "01 local": ("01_generate.py --prompts IN/prompts.jsonl --out OUT/samples.jsonl --model MODEL "
                 "--device cpu --n 2 --batch 8 --max-new-tokens 16", 0),
    "02 rules": ("02_decompose.py --in IN/samples.jsonl --out OUT/facts.jsonl "
                 "--questions-out OUT/questions.jsonl", 0),
    "03 llm": ("03_verify.py --in IN/facts.jsonl --out OUT/verified.jsonl --corpus IN/corpus.jsonl "
               f"--method llm --steps 1 {ASKS} repeat", 1),
    "04 facttune": ("04_build_prefs.py facttune --in IN/verified.jsonl --out OUT/prefs.jsonl "
                    "--eval-out OUT/held.jsonl", 0),
    "05 full": ("05_train.py --prefs IN/prefs.jsonl --eval-prefs IN/held.jsonl --out OUT/tuned "
                "--model MODEL --device cpu --full --batch 4 --save-every 1", 0),
    "06 compare": ("06_eval.py compare base=IN/verified.jsonl tuned=IN/more.jsonl --pictures OUT "
                   "--out-md OUT/table.md --out-json OUT/table.json --report OUT/page.html", 0),
    "01 server": ("01_generate.py --prompts IN/prompts.jsonl --out OUT/samples.jsonl --n 2 "
                  f"{ASKS} seed", 1),
    "02 llm": ("02_decompose.py --in IN/samples.jsonl --out OUT/facts.jsonl --method llm "
               f"--questions-out OUT/questions.jsonl {ASKS} facts", 1),
    "03 lexical": ("03_verify.py --in IN/facts.jsonl --out OUT/verified.jsonl "
                   "--corpus IN/corpus.jsonl", 0),
    "04 factalign": ("04_build_prefs.py factalign --in IN/verified.jsonl IN/more.jsonl --balance "
                     "--out OUT/prefs.jsonl", 0),
    "06 winrate": ("06_eval.py winrate base=IN/verified.jsonl tuned=IN/greedy.jsonl "
                   f"--out OUT/annotations.json {ASKS} longer", 1),
    "03 answers": ("03_verify.py --in IN/facts.jsonl --out OUT/verified.jsonl --method answers "
                   "--corpus IN/corpus.jsonl --answers IN/answers.jsonl", 0),
    "05 lora": ("05_train.py --prefs IN/prefs.jsonl --out OUT/tuned --model MODEL --device cpu "
                "--batch 4 --save-every 1", 0),
    "03 rate": ("03_verify.py --in IN/samples.jsonl --out OUT/rated.jsonl --method rate "
                f"{ASKS} rater", 1),
    "06 plot": ("06_eval.py plot dpo=IN/log.jsonl --out OUT/curves.png", 0),
    "06 shift": ("06_eval.py shift in=IN/greedy.jsonl --model MODEL --base MODEL --device cpu "
                 "--out OUT/shift.png", 0),
}


# ---------------------------------------------------------------------------------------------
# A small world, and runs in it

def filled_in(command, folder, world):
    """The words of a command whose files are in a folder."""
    for name, there in (("IN/", f"{folder}/in/"), ("OUT", f"{folder}/out"),
                        ("MODEL", world.model), ("URL", world.url)):
        command = command.replace(name, str(there))
    return command.split()


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory, request):
    """All inputs in world.folder/in, what no stage makes and what the stages make of it; a model, a
    server, a launcher; what undisturbed runs left, and a count of what became of the trials."""
    folder = tmp_path_factory.mktemp("world")
    asked = [{**row, "fact_based": True} for row in reliability.prompt_rows(8, 1000)]
    told = [{**row, "id": f"{row['id']}/{k}", "prompt_id": row["id"], "finish": "stop",
             "response": reliability.TEXT.format(
                 row["topic"], *(LANDS[i + near] for near in ((-1, -2), (-1, 9), (8, 9))[k]))}
            for i, row in enumerate(asked) for k in range(3)]
    log = [{"id": f"step {n}", "step": n, "loss": 1 / (n + 1), "rewards/margins": n / 9}
           for n in range(400)]
    (folder / "in").mkdir()
    for name, rows in (("prompts", asked), ("samples", told), ("log", log),
                       ("corpus", reliability.corpus_rows())):
        write_rows(folder / f"in/{name}.jsonl", rows)
    server = serve(delay=.002, script={LANDS[1]: ["400", "forever"]})
    with server as server, reliability.launch(*HEAVY) as launcher:
        world = SimpleNamespace(folder=folder, model=tiny_model, url=server.url, launcher=launcher,
                                whole={}, became=Counter())

        def make(command):
            script, *flags = filled_in(command, folder, world)
            assert reliability.here(script.removesuffix(".py"), *flags)[0] == 0

        make("02_decompose.py --in IN/samples.jsonl --out IN/facts.jsonl "
             "--questions-out IN/questions.jsonl")
        write_rows(folder / "in/answers.jsonl", [
            {**row, "id": f"{row['id']}/{k}", "prompt_id": row["id"], "finish": "stop",
             "response": said} for row in read_rows(folder / "in/questions.jsonl")
            for k, said in enumerate((row["answer"], "Peru"))])
        make("03_verify.py --in IN/facts.jsonl --out IN/verified.jsonl --corpus IN/corpus.jsonl")
        write_rows(folder / "in/more.jsonl", [
            {**row, "id": f"{row['id']} again"} for row in read_rows(folder / "in/verified.jsonl")
            if not row["id"].endswith("/2")])
        make("04_build_prefs.py facttune --in IN/verified.jsonl --out IN/prefs.jsonl "
             "--eval-out IN/held.jsonl")
        make("01_generate.py --prompts IN/prompts.jsonl --out IN/greedy.jsonl --model MODEL "
             "--device cpu --n 1 --temperature 0 --max-new-tokens 16")
        yield world
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    for trouble in TROUBLES if "NANOFACT_CHAOS" in os.environ else ():
        ends = [f"{n} {what}" for (name, what), n in world.became.items() if name == trouble]
        terminal.write_line(f"\n{trouble:<15} {', '.join(sorted(ends))}")


def left(t):
    """{name: bytes} of what a run left in its folder, without what it was paid for."""
    found = {path: data.replace(str(t.folder).encode(), b"FOLDER")
             for path, data in reliability.snapshot(t.out).items() if "replies" not in path.name}
    return {str(path.relative_to(t.out)): sorted(data.replace(b",", b"").split()) if path.name ==
            "adapter_config.json" else data for path, data in found.items()}  # peft writes a set


def start(t, **disturbed):
    return reliability.start(t.launcher, t.argv, out=t.out, **disturbed)


def finish(t):
    """(exit status, stderr) of what was started."""
    code = reliability.finish(t.launcher)
    said = (t.folder / "out-stderr").read_text(encoding="utf-8")
    assert "Traceback" not in said, said
    return code, said


def run(t, **disturbed):
    """The command, disturbed; where it says that it is done, it is."""
    start(t, **disturbed)
    code, said = finish(t)
    assert code != t.code or t.whole in (None, left(t))
    return code, said


@pytest.fixture
def trial(world, tmp_path):
    """trial(n): a job in a folder of its own, a trouble, dice. An undisturbed run ends with t.code
    and leaves t.whole: so many pages of a disk, its largest file of t.size bytes; it has t.seen
    moments."""
    def begin(name, folder):
        (folder / "out").mkdir(parents=True)
        shutil.copytree(world.folder / "in", folder / "in")
        command, code = JOBS[name]
        return SimpleNamespace(launcher=world.launcher, folder=folder, out=folder / "out",
                               argv=filled_in(command, folder, world), code=code, whole=None)

    def draw(n):
        name, trouble = list(JOBS)[n % len(JOBS)], list(TROUBLES)[n % len(TROUBLES)]
        if name not in world.whole:
            t = begin(name, world.folder / name.replace(" ", "-"))
            code, said = run(t, calls=-1)
            assert code == t.code, said
            sizes = [len(data) for data in reliability.snapshot(t.out).values()]
            world.whole[name] = {
                "whole": left(t), "seen": json.loads((t.folder / "out-stdout-seen").read_text()),
                "pages": sum(-(-size // PAGE) for size in sizes), "size": max(sizes)}
        t = begin(name, tmp_path)
        vars(t).update(world.whole[name], dice=random.Random(n), trouble=trouble, later=later)
        return t

    with ExitStack() as later:
        yield draw


# ---------------------------------------------------------------------------------------------
# Troubles: each says what became of the disturbed run; the same command then follows it

def moment(t):
    """A moment of the undisturbed run: any call, or any operation on an output."""
    kind = t.dice.choice(list(t.seen))
    return {"calls": 0, kind: t.dice.randint(1, t.seen[kind])}


def begun(t):
    """Half of the time there is something already, that a kill left."""
    if t.dice.random() < .5:
        run(t, **moment(t))


def refused(t, code, said):
    """Whether the run could not write, and said so in its last line."""
    if code == t.code:
        return "too late"
    assert code == 2 and CANNOT.search(said.splitlines()[-1]), (code, said)
    return "refused"


def killed(t):
    """Up to three times."""
    codes = [run(t, **moment(t))[0] for _ in range(t.dice.randint(1, 3))]
    assert set(codes) <= {-signal.SIGKILL, t.code}
    return "stopped" if -signal.SIGKILL in codes else "too late"


def torn(t):
    """Killed in the middle of a write, at any byte: the last line is none."""
    code, _ = run(t, bytes=t.dice.randint(PAGE, t.size), torn=True)
    assert code in (-signal.SIGXFSZ, t.code)
    return "stopped" if code < 0 else "too late"


def interrupted(t):
    """Ctrl-C."""
    code, said = run(t, what=signal.SIGINT, **moment(t))
    assert code == t.code or said.endswith("\ninterrupted; the same command resumes\n")
    assert code in (t.code, 130)
    return "stopped" if code == 130 else "too late"


def second_process(t):
    """While the first one waits at a moment, a second one begins and ends."""
    pid, waits, second = start(t, what=0, **moment(t)), t.folder / "out-stdout-waits", None
    with suppress(ProcessLookupError):  # it ended before that moment
        while not waits.exists():
            os.kill(pid, 0)
            time.sleep(.002)
        second = call(*t.argv, env={**os.environ, "OMP_NUM_THREADS": "1"})
        waits.unlink()
    first, said = finish(t)
    if not second:
        return "too late"
    assert second.returncode == t.code or (
        second.returncode == 2 and "another process" in second.stderr), second.stderr
    codes = {first, second.returncode}
    assert codes <= {t.code, 2} and t.code in codes, said
    assert left(t) == t.whole
    return "refused" if 2 in codes else "both done"


def bad_input(t, path, change):
    """Whatever is there, a file of bad lines is refused by the number of the line."""
    begun(t)
    before, text = left(t), path.read_text(encoding="utf-8")
    path.write_text("\n".join(change(text.rstrip("\n").split("\n"))), encoding="utf-8")
    code, said = run(t)
    path.write_text(text, encoding="utf-8")
    assert code == 2 and re.fullmatch(rf"{re.escape(str(path))}:\d+: expected .*\n", said), said
    assert left(t) == before
    return "refused"


def inputs(t, but=None):
    found = [Path(word.partition("=")[2] or word) for word in t.argv]
    return [path for path in found if path.parent.name == "in" and path.stem != but]


def duplicate_id(t):
    path = t.dice.choice(inputs(t, "corpus"))
    return bad_input(t, path, lambda lines: [*lines, t.dice.choice(lines)])


def torn_input(t):
    """As it is while the stage before still writes it."""
    def cut(lines):
        *whole, last = lines
        return [*whole, last[:t.dice.randrange(1, len(last))]]

    return bad_input(t, t.dice.choice(inputs(t)), cut)


def read_only(t):
    begun(t)
    before = left(t)
    folders = [t.out, *(path for path in t.out.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    done = run(t, bound=True)
    for folder in folders:
        folder.chmod(0o755)
    assert left(t) == before
    return refused(t, *done)


def full_disk(t):
    """ENOSPC: a disk of fewer pages than the outputs need; then it grows."""
    def mount(size, how):
        done = subprocess.run(["mount", *how, "-o", f"size={size}", "tmpfs", t.out], text=True,
                              capture_output=True)
        if done.returncode:
            pytest.skip(f"no small disk here: {done.stderr}")

    mount(t.dice.randrange(t.pages) * PAGE or 1, ["-t", "tmpfs"])
    t.later.callback(subprocess.run, ["umount", t.out])
    done = run(t)
    mount("64m", ["-o", "remount"])
    return refused(t, *done)


def large_file(t):
    """EFBIG: a file may not grow beyond any byte, as under a quota."""
    return refused(t, *run(t, bytes=t.dice.randint(PAGE, t.size)))


TROUBLES = {trouble.__name__: trouble for trouble in (
    killed, torn, interrupted, second_process, duplicate_id, torn_input, read_only, full_disk,
    large_file)}


@pytest.mark.parametrize("n", range(TRIALS))
def test_trial(n, trial, world):
    t = trial(n)
    what = TROUBLES[t.trouble](t)
    code, said = run(t)
    assert code == t.code, said
    world.became[t.trouble, what] += 1
