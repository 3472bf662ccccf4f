"""The `general` prompts: each check takes its good answer, and no bad one, at once."""
import itertools
import re
import time

import pytest
from conftest import ROOT, read_rows

PARTS = ("train", "eval")
ROWS = {part: read_rows(ROOT / f"data/prompts_general_{part}.jsonl") for part in PARTS}
ALL = ROWS["train"] + ROWS["eval"]
BAD = ["", "I'm sorry, but I can't help with that.",
       "As an AI language model, I cannot do this. Please give me more details.",
       "Sure! How can I help you today?", "N/A", "?", "...", "\n\n\n", "- \n- \n- ", "[]"]


def passes(row, response):
    return bool(re.search(row["check"], response.strip()))


def kind(row):
    """What a row asks for: its id begins with general-KIND-."""
    return re.match(r"general-((?:one-word|one-sentence|at-most|yes-no)|[a-z]+)-", row["id"])[1]


def of(*kinds):
    found = [row for row in ALL if kind(row) in kinds]
    assert found
    return pytest.mark.parametrize("row", found, ids=lambda row: row["id"])


def quoted(row):
    return re.search(r"'(\w+)'", row["prompt"])[1]


def numbers(row):
    return [int(n) for n in re.findall(r"\d+", row["prompt"])]


def test_two_sets_of_60_alike_and_apart():
    for part, rows in ROWS.items():
        assert len(rows) == 60
        for row in rows:
            assert set(row) == {"id", "topic", "prompt", "fact_based", "domain", "check", "example"}
            assert row["fact_based"] is False and row["domain"] == "general"
            assert re.fullmatch(r"[a-z0-9]+(?:-[a-z0-9]+)+", row["id"]), row["id"]
    kinds = [sorted(map(kind, rows)) for rows in ROWS.values()]
    assert kinds[0] == kinds[1] and len(set(kinds[0])) >= 20
    facts = [row for part in ("train", "dev", "eval", "ood")
             for row in read_rows(ROOT / f"data/prompts_{part}.jsonl")]
    for field in ("id", "topic", "prompt"):  # 04 refuses a shared one
        values = [row[field].casefold() for row in [*ALL, *facts]]
        assert len(set(values)) >= len(ALL) + len({row[field].casefold() for row in facts})
        assert len({row[field].casefold() for row in ALL}) == len(ALL)
    names = re.compile(r"\b(?:" + "|".join(re.escape(row["topic"]) for row in facts) + r")\b")
    assert [row["prompt"] for row in ALL if names.search(row["prompt"])] == []


@pytest.mark.parametrize("row", ALL, ids=lambda row: row["id"])
def test_good_passes_and_bad_fails(row):
    good = row["example"]
    assert passes(row, good) and passes(row, f"\n {good}\n")
    rambling = good + "\n\n" + " ".join([good, "Here is some more about it."] * 20)
    half = row["prompt"] + " " + row["prompt"]
    for bad in [*BAD, row["prompt"], row["prompt"].upper(), half, rambling, good * 60]:
        assert not passes(row, bad), bad


@pytest.mark.parametrize("row", ALL, ids=lambda row: row["id"])
def test_a_good_answer_to_something_else_fails(row):
    """Nearly: a question about rain may take what was said of a wet dog, but nothing takes all."""
    taken = [other["id"] for other in ALL if other is not row and passes(row, other["example"])]
    assert len(taken) <= 3, taken


@pytest.mark.parametrize("row", ALL, ids=lambda row: row["id"])
def test_hostile_text_takes_no_time(row):
    good, began = row["example"], time.process_time()
    for unit in ("a", "a ", " ", "\n", "- ", "- a\n", "1. a\n2. ", "[", '["a", ', "A B ", "9 ", "?",
                 good, good + " ", good + "\n", good[:-1] + "x", "Dear Tom ", "\u00e9"):
        for text in (unit * (100_000 // len(unit)), unit * (200 // len(unit)) + "!"):
            re.search(row["check"], text)
    assert time.process_time() - began < 1


@of("reverse")
def test_reverse(row):
    word = quoted(row)
    right = {"".join(p) for p in itertools.permutations(word) if passes(row, "".join(p))}
    assert right == {word[::-1]}


@of("sum")
def test_sum(row):
    assert [n for n in range(200) if passes(row, str(n))] == [sum(numbers(row))]


@of("sort")
def test_sort(row):
    orders = list(itertools.permutations(numbers(row)))
    assert len(orders) == 6
    right = [order for order in orders if passes(row, ", ".join(map(str, order)))]
    assert right == [tuple(sorted(numbers(row)))]


@of("larger")
def test_larger(row):
    given = numbers(row)
    right = max(given) if "largest" in row["prompt"] else min(given)
    assert [n for n in range(100) if passes(row, str(n))] == [right]
    assert not passes(row, ", ".join(map(str, given)))


@of("letters")
def test_letters(row):
    assert [n for n in range(30) if passes(row, str(n))] == [len(quoted(row))]


@of("at-most")
def test_at_most(row):
    count = {"six": 6, "twelve": 12, "fifteen": 15, "twenty": 20}
    limit = count[re.search(rf"\b({'|'.join(count)})\b", row["prompt"])[1]]
    good = row["example"].split()
    assert passes(row, " ".join(["so"] * (limit - len(good)) + good))
    assert not passes(row, " ".join(["so"] * (limit - len(good) + 1) + good))


@of("one-word", "yes-no", "copy", "one-sentence", "contains", "starts", "ends", "question")
def test_the_answer_twice_is_too_much(row):
    assert not passes(row, f"{row['example']} {row['example']}")


@of("bullets", "numbered")
def test_lines_are_counted_and_differ(row):
    good = row["example"].split("\n")
    assert passes(row, "\n\n".join(good))
    assert not passes(row, "\n".join(good[:-1]))
    assert not passes(row, "\n".join([*good, good[-1]]))
    first = good[0].split(" ", 1)[1]
    assert not passes(row, "\n".join(f"{line.split(' ')[0]} {first}" for line in good))


@of("upper", "ends", "starts")
def test_format_decides(row):
    good = row["example"]
    worse = {"upper": good.lower(), "ends": good + " It is so.", "starts": "Well, " + good}
    assert not passes(row, worse[kind(row)])
