"""04_build_prefs.py: the pairing rule against brute force, the training text, what is refused."""
import json
import random
from fractions import Fraction

import pytest
from conftest import call, read_rows, stage, write_rows

prefs = stage("04_build_prefs")


def verified(prompt_id, k, labels, sentences=None, finish="stop", topic=None, **more):
    """A row of 03: one sentence for each list of labels, every fact about something else."""
    labels = labels if labels and isinstance(labels[0], (list, tuple)) else [labels]
    texts = sentences or [f"Response {k} says thing {n}." for n in range(len(labels))]
    response, spans, count = " ".join(texts), [], 0
    for text, marks in zip(texts, labels):
        start = response.index(text)
        facts = [{"text": f"fact w{count + n}x{n}", "label": mark} for n, mark in enumerate(marks)]
        count += len(marks)
        spans.append({"text": text, "start": start, "end": start + len(text), "facts": facts})
    return {"id": f"{prompt_id}/{k}", "prompt_id": prompt_id, "topic": topic or prompt_id.title(),
            "prompt": f"Tell me about {prompt_id}.", "response": response, "finish": finish,
            "sentences": spans, "abstained": False, **more}


def build(rows, **kwargs):
    groups = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return prefs.facttune(groups, **kwargs)


# ---------------------------------------------------------------------------------------------
# The rule

@pytest.mark.parametrize("reward", ["precision", "f1"])
def test_best_vs_rest_against_brute_force(reward):
    rng = random.Random(0)
    k = 4
    for trial in range(60):
        counts = [(rng.randint(0, 5), rng.randint(0, 3), rng.randint(0, 2)) for _ in range(6)]
        rows = [verified("peru", i, ["S"] * s + ["NS"] * ns + ["IR"] * ir)
                for i, (s, ns, ir) in enumerate(counts)]
        exact = {}  # by the textbook's harmonic mean, in exact arithmetic
        for i, (s, ns, _) in enumerate(counts):
            if s + ns:
                p, r = Fraction(s, s + ns), min(Fraction(s, k), Fraction(1))
                exact[i] = p if reward == "precision" else 2 * p * r / (p + r) if s else Fraction(0)
        top = max(exact.values(), default=None)
        best = min((i for i in exact if exact[i] == top), default=None)
        expected = {f"peru/{best}>peru/{i}" for i in exact if exact[i] < top}
        pairs, prompts, unused = build(rows, reward=reward, k=k)
        assert {pair["id"] for pair in pairs} == expected
        assert sum(prompts.values()) == 1 and unused["no_fact"] == 6 - len(exact)
        for pair in pairs:
            assert pair["score_chosen"] == pytest.approx(float(top), abs=1e-12)


def test_a_top_scored_tie_is_no_pair():
    pairs, prompts, _ = build([verified("fiji", k, ["S"]) for k in range(3)])
    assert pairs == [] and prompts == {"tied": 1}


def test_margin_is_exclusive():
    rows = [verified("fiji", 0, ["S", "S"]), verified("fiji", 1, ["S", "NS"]),
            verified("fiji", 2, ["NS", "NS"])]
    assert [p["id"] for p in build(rows, margin=0.5)[0]] == ["fiji/0>fiji/2"]


def test_every_prompt_and_response_is_used_or_counted():
    rows = [verified("a", 0, ["S"]), verified("a", 1, ["NS"]),                      # used
            verified("b", 0, ["S"]), verified("b", 1, ["S"]),                       # tied
            verified("c", 0, ["S"]), verified("c", 1, [], abstained=True),          # few
            verified("d", 0, ["IR"]), verified("d", 1, ["S", "S", "NS", None])]     # few: 25 % null
    pairs, prompts, unused = build(rows)
    assert prompts == {"used": 1, "tied": 1, "few": 2}
    assert unused == {"abstained": 1, "no_fact": 1, "unjudged": 1}
    assert [pair["prompt_id"] for pair in pairs] == ["a"]


def test_twenty_per_cent_null_is_still_judged():
    rows = [verified("a", 0, ["S"] * 4 + [None]), verified("a", 1, ["NS"])]
    assert build(rows)[0][0]["score_chosen"] == 1.0


def test_repeated_facts_count_once():
    padded = verified("a", 0, ["NS"])
    fact = {"text": "A borders Chad", "label": "S"}
    padded["sentences"][0]["facts"] += [dict(fact) for _ in range(9)]
    pairs, _, _ = build([padded, verified("a", 1, ["S", "NS", "S"])])
    assert [p["id"] for p in pairs] == ["a/1>a/0"]  # 2/3 beats 1/2; nine copies would be 9/10
    assert pairs[0]["score_rejected"] == 0.5


def test_repetitive_and_repeated_responses_make_no_row():
    ten = "one two three four five six seven eight nine ten "
    rows = [verified("a", 0, ["S"], [ten * 6 + "end."]), verified("a", 2, ["NS"]),
            verified("a", 1, ["S"], [ten * 5 + "end."]),
            verified("a", 3, ["NS"], ["Response 2 says thing 0."])]
    pairs, _, unused = build(rows)
    assert unused == {"repetitive": 1, "duplicate": 1}
    assert [p["id"] for p in pairs] == ["a/1>a/2"]


def test_repeats_against_a_loop():
    rng = random.Random(1)
    for _ in range(50):
        words = [rng.choice("ab") for _ in range(rng.randint(0, 60))]
        grams = [tuple(words[i:i + 10]) for i in range(len(words) - 9)]
        expected = max((grams.count(g) for g in grams), default=0)
        assert prefs.repeats(" ".join(words)) == expected


# ---------------------------------------------------------------------------------------------
# Training text

def spans(*pairs):
    return [{"start": a, "end": b, "facts": []} for a, b in pairs]


@pytest.mark.parametrize("response, sentences, finish, expected", [
    ("One. Two.", spans((0, 4), (5, 9)), "stop", ("One. Two.", "stop")),
    ("One. Two.\n", spans((0, 4), (5, 9)), "stop", ("One. Two.", "stop")),
    ("One. Two thi", spans((0, 4), (5, 12)), "length", ("One.", "length")),
    ("One. Two thi", spans((0, 4)), "length", ("One.", "length")),
    ("One. Two.", spans((0, 4), (5, 9)), "length", ("One.", "length")),  # 02 took no facts there
    ("One. Two thi", spans((0, 4)), "stop", ("One.", "length")),         # something was dropped
    ("One thi", spans((0, 7)), "length", ("", "length")),
    ("<think>x</think> One.", spans((17, 21)), "stop", ("One.", "stop")),
    ("", [], "stop", ("", "length")),
])
def test_training_text(response, sentences, finish, expected):
    row = {"response": response, "sentences": sentences, "finish": finish}
    assert prefs.training_text(row) == expected


def test_a_pair_says_how_each_side_ends():
    cut = verified("a", 0, [["S"], []], ["It is in Asia.", "It has a pop"], finish="length")
    pair, = build([cut, verified("a", 1, ["NS"])])[0]
    assert pair["chosen"] == [{"role": "assistant", "content": "It is in Asia."}]
    assert pair["finish"] == {"chosen": "length", "rejected": "stop"}
    assert pair["prompt"] == [{"role": "user", "content": "Tell me about a."}]
    assert pair["kind"] == "fact"


# ---------------------------------------------------------------------------------------------
# The command

@pytest.fixture
def files(tmp_path):
    rows = [verified(f"land{i}-{aspect}", k, ["S"] * (k % 3) + ["NS"], topic=f"Land{i}")
            for i in range(10) for aspect in ("all", "geo") for k in range(3)]
    return write_rows(tmp_path / "v.jsonl", rows), tmp_path / "prefs.jsonl", tmp_path / "held.jsonl"


def test_command_splits_by_topic_and_repeats_itself(files):
    verified_file, out, held = files
    command = ("04_build_prefs.py", "facttune", "--in", verified_file, "--out", out,
               "--eval-out", held)
    first = call(*command)
    assert first.returncode == 0, first.stderr
    train, test = read_rows(out), read_rows(held)
    assert len({row["topic"] for row in test}) == 1 and len(train) + len(test) == 40
    assert not {row["topic"] for row in train} & {row["topic"] for row in test}
    for line in ("prompts_in:       20", "  used:           20", "pairs:            36",
                 "pairs_held_out:   4"):
        assert line in first.stderr
    written = out.read_bytes(), held.read_bytes()
    assert call(*command).returncode == 0
    assert (out.read_bytes(), held.read_bytes()) == written
    other = call(*command, "--seed", 5)
    assert other.returncode == 2 and "--seed 0 -> 5" in other.stderr
    assert (out.read_bytes(), held.read_bytes()) == written
    assert call(*command, "--seed", 5, "--overwrite").returncode == 0


def test_the_split_is_stable_and_follows_the_seed():
    pairs = [{"topic": f"t{i}"} for i in range(100) for _ in range(3)]
    held = [frozenset(p["topic"] for p in prefs.split_topics(pairs, 0.1, seed)[1])
            for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2] and all(len(topics) == 10 for topics in held)


def test_datasets_reads_the_file_as_trl_expects_it(files):
    from datasets import load_dataset
    verified_file, out, _ = files
    done = call("04_build_prefs.py", "facttune", "--in", verified_file, "--out", out)
    assert done.returncode == 0, done.stderr
    row = load_dataset("json", data_files=str(out), split="train", cache_dir=str(out) + ".d")[0]
    for column in ("prompt", "chosen", "rejected"):
        assert [m["role"] for m in row[column]] == ["user" if column == "prompt" else "assistant"]


@pytest.mark.parametrize("row", [
    {"id": "land3-geo", "prompt": "Other words."},
    {"id": "x", "topic": "LAND3", "prompt": "Other words."},
    {"id": "x", "prompt": [{"role": "user", "content": "Tell me about land3-geo."}]},
])
def test_leakage_is_refused_with_the_ids(files, row, tmp_path):
    verified_file, out, _ = files
    eval_prompts = write_rows(tmp_path / "eval.jsonl", [{"id": "y", "prompt": "z"}, row])
    done = call("04_build_prefs.py", "facttune", "--in", verified_file, "--out", out,
                "--eval-prompts", eval_prompts)
    assert done.returncode == 2 and "land3-geo" in done.stderr and not out.exists()
    assert "Traceback" not in done.stderr and "land4" not in done.stderr


def broken(field, value):
    row = verified("a", 1, ["S"])
    holder = row if field in row else row["sentences"][0]
    if field in ("label", "text!"):
        holder = row["sentences"][0]["facts"][0]
    if value is None:
        del holder[field.strip("!")]
    else:
        holder[field.strip("!")] = value
    return row


@pytest.mark.parametrize("field, value, named", [
    ("finish", "eos", "finish"), ("label", None, "label"), ("label", "T", "label"),
    ("text!", 3, "text"), ("end", 999, "response"), ("start", None, "response"),
    ("facts", "x", "facts"), ("prompt_id", None, "prompt_id"), ("sentences", {}, "sentences"),
])
def test_bad_rows_are_named_by_file_and_line(tmp_path, field, value, named):
    path, out = tmp_path / "v.jsonl", tmp_path / "p.jsonl"
    good, bad = json.dumps(verified("a", 0, ["NS"])), json.dumps(broken(field, value))
    path.write_text(f"{good}\n\n{bad}\n", encoding="utf-8")
    done = call("04_build_prefs.py", "facttune", "--in", path, "--out", out)
    assert done.returncode == 2 and f"{path}:3: expected" in done.stderr, done.stderr
    assert named in done.stderr and "Traceback" not in done.stderr and not out.exists()


def test_one_prompt_id_means_one_prompt(tmp_path):
    rows = [verified("a", 0, ["S"]), {**verified("a", 1, ["NS"]), "prompt": "Something else."}]
    path = write_rows(tmp_path / "v.jsonl", rows)
    done = call("04_build_prefs.py", "facttune", "--in", path, "--out", tmp_path / "p.jsonl")
    assert done.returncode == 2 and f"{path}:2:" in done.stderr


def test_no_pairs_is_said_and_nothing_is_written(tmp_path):
    path = write_rows(tmp_path / "v.jsonl", [verified("a", k, ["S"]) for k in range(3)])
    out = tmp_path / "p.jsonl"
    done = call("04_build_prefs.py", "facttune", "--in", path, "--out", out)
    assert done.returncode == 2 and "no pairs" in done.stderr and not out.exists()


def test_length_difference_warns(tmp_path):
    long = " ".join(f"word{n}" for n in range(20)) + "."
    rows = [verified("a", 0, ["S"], [long]), verified("a", 1, ["NS"], ["No."])]
    path = write_rows(tmp_path / "v.jsonl", rows)
    done = call("04_build_prefs.py", "facttune", "--in", path, "--out", tmp_path / "p.jsonl")
    assert done.returncode == 0 and "20 %" in done.stderr


def test_two_files_are_joined(tmp_path):
    one = write_rows(tmp_path / "1.jsonl", [verified("a", 0, ["S"])])
    two = write_rows(tmp_path / "2.jsonl", [verified("a", 1, ["NS"])])
    out = tmp_path / "p.jsonl"
    assert call("04_build_prefs.py", "facttune", "--in", one, two, "--out", out).returncode == 0
    assert [row["id"] for row in read_rows(out)] == ["a/0>a/1"]
    same = write_rows(tmp_path / "3.jsonl", [verified("a", 0, ["NS"])])
    done = call("04_build_prefs.py", "facttune", "--in", one, same, "--out", tmp_path / "q.jsonl")
    assert done.returncode == 2 and "a/0" in done.stderr
