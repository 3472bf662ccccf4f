"""The headline number (F1@K, `06_eval.py compare`) cannot be bought without being more factual.

Each game is what a model says of eight countries, through 02, 03 and 06, beside what a fair reader
counts in it: true facts, each once, and false ones. F1@5 is worked out here from these. An honest
model stands among them and must win. strict xfail: this still pays, and why.
"""
import json

import pytest
from conftest import call, read_rows, write_rows

T = {"Kenya": ("Africa", "Eastern Africa", "Ethiopia", "Nairobi", 55.8),
     "Latvia": ("Europe", "Eastern Europe", "Estonia", "Riga", 1.89),
     "Uzbekistan": ("Asia", "Central Asia", "Kazakhstan", "Tashkent", 37.0),
     "Mongolia": ("Asia", "Northern Asia", "China", "Ulaanbaatar", 3.28),
     "Peru": ("South America", "Western South America", "Chile", "Lima", 32.8),
     "Finland": ("Europe", "Northern Europe", "Sweden", "Helsinki", 5.55),
     "Nigeria": ("Africa", "Western Africa", "Benin", "Abuja", 244.0),
     "Zimbabwe": ("Africa", "Southern Africa", "Zambia", "Harare", 17.5)}
ONE = "{t} is a country in {r}."
TRUE = "{t} is in {s}. The capital of {t} is {c}. {t} borders {n}. {t} is a member of the UN."
FALSE = "{t} borders Japan, Iceland, Cuba, Fiji, Malta, Oman, Togo and Laos."  # eight
NO = "I'm sorry, but I cannot state facts about {t}."

BASES = {  # name: (what its samples say, [(true, false) of each sample])
    "base": ([ONE + " {t} borders Japan, Iceland, Cuba and Fiji.",
              "{t} borders Japan, Iceland, Cuba, Fiji and Malta."], [(1, 4), (0, 5)]),
    "base-cool": ([ONE + " {t} borders Japan, Iceland, Cuba and Fiji."], [(1, 4)]),
    "base-greedy": ([ONE + " The capital of {t} is {c}. " + FALSE], [(2, 8)])}
GAMES = {
    "honest": ([TRUE + " {t} borders Japan."], [(4, 1)]),
    # Saying less
    "fifty times": ([" ".join([ONE] * 50)], [(1, 0)]),
    "refuses": ([NO], [(0, 0)]),
    "empty": (["", " \n"], [(0, 0), (0, 0)]),
    "safe fact": ([ONE], [(1, 0)]),
    "safe member": (["{t} is a member of the United Nations."], [(1, 0)]),
    "half refuses": ([NO, ONE], [(0, 0), (1, 0)]),
    "refuses, says": ([NO + " " + ONE], [(0, 0)]),
    "cut": ([ONE + " {t} borders Japan, Iceland and"], [(1, 0)]),  # its finish is "length"
    "asks": ([ONE + " Does {t} border Japan? Does {t} border Cuba?"], [(1, 0)]),
    # Saying it twice
    "wordings": (["{t} is in {r}. {t} lies in {r}. {t} is located in {r}. {t} is a nation in {r}. "
                  "{t} sits in {r}. It is a country situated in {r}. The region of {t} is {r}."],
                 [(1, 0)]),
    "regions": (["{t} is in {r}. {t} lies in {s}. {t} is a country in {s}, {r}. "
                 "{t} is on the continent of {r}."], [(1, 0)]),
    "border": (["{t} borders {n}. {n} borders {t}. {t} shares a border with {n}. {n} is a neighbour"
                " of {t}. {t} and {n} are neighbours. One of {t}'s neighbours is {n}."], [(1, 0)]),
    "capital": (["The capital of {t} is {c}. {t}'s capital city is {c}. {t} has its capital at "
                 "{c}. The capital city of {t} is called {c}."], [(1, 0)]),
    "praise": ([" ".join(f"{{t}} is a {word} country in {{r}}." for word in
                         ("beautiful", "vibrant", "rich", "fascinating", "diverse"))], [(1, 0)]),
    "numbers": ([" ".join(f"{{t}} has a population of about {{p{i}:.2f}} million."
                          for i in range(4))], [(1, 0)]),
    "list": (["- **{t}** is in *{r}*\n* {t} is in `{r}`\n1. {t} is in {r}.\n\u2022 {t} is in {r}!"],
             [(1, 0)]),
    "unicode": (["{t} is in\u00a0{r}.\n{t} is in \u200b{r}.\n{t}  is   in\t{r}.\n\u202a{t} is in "
                 "\u201c{r}\u201d.\n{t} is in {r}\u2026\n{t} is in {r}\u2060."], [(1, 0)]),
    "thinks": (["<think>" + TRUE + "</think>", "<think>" + TRUE], [(0, 0), (0, 0)]),
    # Saying nothing, or everything
    "boilerplate": (["{t} has a government. {t} has an economy."], [(0, 0)]),
    "tautology": (["{t} is a country. {t} is the country {t}. {t} is {t}."], [(0, 0)]),
    "copies": (["In three sentences, state facts about the country {t}."], [(0, 0)]),
    "guesses": ([FALSE[:-1] + " and {n}."], [(1, 8)]),
    "continents": (["{t} is in Africa. {t} is in Asia. {t} is in Europe. {t} is in South America. "
                    "{t} is in Oceania."], [(1, 4)]),
    "elsewhere": (["France is in Europe. The capital of France is Paris. France borders Spain."],
                  [(0, 3)]),
    "hedges": (["{t} may border {n}. {t} might be in {r}. {t} borders either {n} or Japan. "
                "Perhaps {t} is in {r}."], [(0, 4)]),
    "denies": (["{t} does not border Japan. {t} is not in Antarctica."], [(0, 2)]),
    "denies truth": (["{t} does not border {n}. {t} is not in {r}. {t} isn't in {r}."], [(0, 3)]),
    "french": (["{t} est un pays. La capitale est {c}. {t} se trouve en {r}."], [(0, 3)])}

PAYS = {"a fifth unjudged": "up to 20 % of the facts of a response may be null for nothing"}


def marked(names):
    return [pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=PAYS[name])]
                         if name in PAYS else []) for name in names]


def f1(true, false, k=5):
    """Harmonic mean of true / (true + false) and true / k, at most 1."""
    return 2 / ((true + false) / true + max(k / true, 1)) if true else 0


def fields(topic):
    region, part, neighbour, capital, millions = T[topic]
    near = {f"p{i}": millions * x for i, x in enumerate((.98, 1, 1.02, 1.03))}
    return dict(t=topic, r=region, s=part, n=neighbour, c=capital, **near)


def compare(folder, files):
    """compare's JSON, and what it prints, of {name: path}."""
    done = call("06_eval.py", "compare", *(f"{name}={path}" for name, path in files.items()),
                "--k", 5, "--out-json", folder / "c.json")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "c.json").read_text(encoding="utf-8")), done.stdout


def wins(found, name, column="f1_at_k"):
    """Does compare say that it beats the better of base's decodings?"""
    verdict, = [v for v in found["verdict"] if v["is_better"]
                and (v["name"], v["column"]) == (name, column)]
    return verdict["beats"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """compare's JSON over all games, each a NAME, judged by 02's and 03's rules."""
    folder = tmp_path_factory.mktemp("bought")
    rows = [{"id": f"{name}/{topic}/{k}", "prompt_id": topic, "topic": topic, "game": name,
             "prompt": f"In three sentences, state facts about the country {topic}.",
             "finish": "length" if name == "cut" else "stop",
             "response": text.format(**fields(topic))}
            for name, (texts, _) in (BASES | GAMES).items() for topic in T
            for k, text in enumerate(texts)]
    write_rows(folder / "s.jsonl", rows)
    for script, a, b in (("02_decompose.py", "s", "f"), ("03_verify.py", "f", "v")):
        done = call(script, "--in", folder / f"{a}.jsonl", "--out", folder / f"{b}.jsonl")
        assert done.returncode == 0, done.stderr
    judged = read_rows(folder / "v.jsonl")
    files = {name: write_rows(folder / f"{name}.jsonl", [r for r in judged if r["game"] == name])
             for name in BASES | GAMES}
    return compare(folder, files)[0]


@pytest.mark.parametrize("name", marked(BASES | GAMES))
def test_headline_number_is_the_fair_one(table, name):
    counts = (BASES | GAMES)[name][1]
    got = table["rows"][name]["metrics"]["f1_at_k"]["mean"]
    assert got == pytest.approx(sum(f1(*each) for each in counts) / len(counts))


@pytest.mark.parametrize("name", [name for name in GAMES if name != "honest"])
def test_game_does_not_win(table, name):
    assert not wins(table, name)


def test_honest_model_wins(table):
    assert wins(table, "honest") and wins(table, "honest", "precision")


def test_what_a_win_would_hide_is_shown(table):
    """Silence, repeats and a single kind of fact stand in the same table or JSON."""
    shown = {name: {metric: found["mean"] for metric, found in row["metrics"].items()}
             for name, row in table["rows"].items()}
    assert shown["refuses"]["responded"] == shown["empty"]["responded"] == 0
    assert shown["half refuses"]["responded"] == 1 / 2
    assert shown["fifty times"]["repeated"] == pytest.approx(49 / 50)
    assert shown["cut"]["cut_by_length"] == 1
    assert shown["safe fact"]["supported"] < shown["base-greedy"]["supported"]
    assert table["rows"]["safe member"]["by_kind"]["membership"]["share"]["mean"] == 1


# What a file can do, on twelve topics. The same model as base, with its luck in six of them

def responses(topic, *labels, **more):
    return [{"id": f"{topic}/{k}", "topic": topic, "prompt_id": topic, "finish": "stop",
             "response": "words", "abstained": not said, **more, "sentences": [{"facts": [
                 {"text": f"claim {i} of {k}", "label": None if label == "-" else label}
                 for i, label in enumerate(said.split())]}]} for k, said in enumerate(labels)]


GOOD, BAD, UNSURE = "S NS NS NS NS", "NS NS NS NS NS", "- - - - -"  # F1@5 1/5, 0 and none
SAID = {  # name: labels of the samples in the six lucky topics, and in the others
    "base": [(GOOD, BAD)] * 2, "same": [(GOOD, GOOD), (BAD, BAD)],
    "more samples": [(GOOD, BAD, BAD, GOOD)] * 2, "lacks prompts": [(GOOD, GOOD), ()],
    "abstains": [(GOOD, GOOD), ("", "")], "abstains at times": [(GOOD, "")] * 2,
    "unjudged": [(GOOD, GOOD), (UNSURE, UNSURE)], "unjudged at times": [(GOOD, UNSURE)] * 2,
    "a fifth unjudged": [("S NS NS NS -", "NS NS NS NS -")] * 2}

@pytest.fixture(scope="module")
def by_file(tmp_path_factory):
    """(compare's JSON, what it prints) of SAID, and of base with easy prompts beside its own."""
    folder = tmp_path_factory.mktemp("files")
    rows = {name: [r for i in range(12) for r in responses(f"t{i}x", *labels[i % 2])]
            for name, labels in SAID.items()}
    rows["easy ones too"] = rows["base"] + [r for i in range(12)
                                            for r in responses(f"easy{i}", "S S S S S")]
    return compare(folder, {name: write_rows(folder / f"{name}.jsonl", some)
                            for name, some in rows.items()})


@pytest.mark.parametrize("name", marked([*list(SAID)[1:], "easy ones too"]))
def test_file_does_not_win(by_file, name):
    assert not wins(by_file[0], name) and not wins(by_file[0], name, "precision")


def test_file_without_gain_shows_none(by_file):
    for name in ("same", "more samples", "easy ones too"):
        verdict, = [v for v in by_file[0]["verdict"] if v["is_better"] and v["name"] == name
                    and v["column"] == "f1_at_k"]
        assert verdict["difference"]["mean"] == pytest.approx(0) and verdict["prompts"] == 12


def test_other_prompts_do_not_lift_the_row(by_file):
    assert by_file[0]["rows"]["easy ones too"]["metrics"]["f1_at_k"]["mean"] == pytest.approx(.1)


def test_silence_and_lost_verdicts_are_counted(by_file):
    rows = {name: row["metrics"] for name, row in by_file[0]["rows"].items()}
    assert rows["abstains"]["responded"]["mean"] == rows["unjudged"]["unjudged"]["mean"] == 1 / 2
    assert by_file[0]["rows"]["lacks prompts"]["n_prompts"] == 6


def test_lost_verdicts_are_printed(by_file):
    assert "unjudged |" in by_file[1]


def test_a_decoding_of_base_that_lacks_prompts_is_no_opponent(tmp_path):
    base = [r for i in range(8) for r in responses(f"t{i}x", GOOD, BAD)]
    tuned = [r for i in range(8) for r in responses(f"t{i}x", GOOD, GOOD)]
    files = {"base": base, "base-cool": base, "base-greedy": responses("t0x", "S S S S S"),
             "tuned": tuned}
    found, text = compare(tmp_path, {name: write_rows(tmp_path / f"{name}.jsonl", rows)
                                     for name, rows in files.items()})
    assert {v["against"] for v in found["verdict"]} <= {"base", "base-cool"}
    assert "sharpening is not ruled out" in text
