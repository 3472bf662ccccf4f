"""04_build_prefs.py: the rules against brute force, the training text, what is refused."""
import json
import random
from fractions import Fraction
from itertools import combinations

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


def build(rows, rule="facttune", **kwargs):
    groups = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return getattr(prefs, rule)(groups, **kwargs)


def unlabelled(row):
    """The row as 02 wrote it, before 03 saw it."""
    sentences = [{**s, "facts": [{"text": fact["text"]} for fact in s["facts"]]}
                 for s in row["sentences"]]
    return {**row, "sentences": sentences}


# ---------------------------------------------------------------------------------------------
# The rules

def drawn(rng, k, reward):
    """(six rows, {index: score}), scored by the textbook's harmonic mean in exact arithmetic."""
    rows, exact = [], {}
    for i in range(6):
        s, ns, ir = rng.randint(0, 5), rng.randint(0, 3), rng.randint(0, 2)
        rows.append(verified("peru", i, ["S"] * s + ["NS"] * ns + ["IR"] * ir))
        if s + ns:
            p, r = Fraction(s, s + ns), min(Fraction(s, k), Fraction(1))
            exact[i] = p if reward == "precision" else 2 * p * r / (p + r) if s else Fraction(0)
    return rows, exact


def fate(exact, made):
    return "used" if made else "few" if len(exact) < 2 else "tied"


@pytest.mark.parametrize("margin", ["0", "0.1", "0.25", "0.5"])
@pytest.mark.parametrize("reward", ["precision", "f1"])
def test_pairs_against_brute_force(reward, margin):
    rng = random.Random(0)
    for trial in range(60):
        rows, exact = drawn(rng, 4, reward)
        everything = set()
        for i, j in combinations(exact, 2):
            if abs(exact[i] - exact[j]) > Fraction(margin):
                everything.add((i, j) if exact[i] > exact[j] else (j, i))
        best = min((i for i in exact if exact[i] == max(exact.values())), default=None)
        for kind in ("best", "all"):
            expected = {(a, b) for a, b in everything if kind == "all" or a == best}
            pairs, prompts, unused = build(rows, reward=reward, k=4, pairs=kind,
                                           margin=float(margin))
            assert {p["id"] for p in pairs} == {f"peru/{a}>peru/{b}" for a, b in expected}
            assert len(pairs) == len(expected)
            assert prompts == {fate(exact, expected): 1}
            assert unused["no_fact"] == 6 - len(exact)
            for pair in pairs:
                for side, k in zip(("chosen", "rejected"), pair["id"].split(">")):
                    score = float(exact[int(k[-1])])
                    assert pair[f"score_{side}"] == pytest.approx(score, abs=1e-12)
                    assert pair[side][0]["content"] == f"Response {k[-1]} says thing 0."


@pytest.mark.parametrize("reward", ["precision", "f1"])
def test_rft_against_brute_force(reward):
    rng = random.Random(1)
    fates = set()
    for trial in range(200):
        rows, exact = drawn(rng, 4, reward)
        rows = rows[:rng.randint(1, 6)]
        exact = {i: score for i, score in exact.items() if i < len(rows)}
        ranked = sorted(exact, key=lambda i: (-exact[i], i))
        expected = ranked[:1] if len(set(exact.values())) > 1 else []
        made, prompts, _ = build(rows, "rft", reward=reward, k=4)
        assert [row["id"] for row in made] == [f"peru/{i}" for i in expected]
        assert [row["score"] for row in made] == [pytest.approx(float(exact[i]), abs=1e-12)
                                                  for i in expected]
        assert prompts == {fate(exact, expected): 1}
        fates |= set(prompts)
    assert fates == {"used", "tied", "few"}


def test_both_kinds_of_pairs_by_hand():
    rows = [verified("fiji", 0, ["S", "NS"]), verified("fiji", 1, ["S"]),
            verified("fiji", 2, ["NS"]), verified("fiji", 3, ["S"])]
    best, every = ([p["id"].replace("fiji/", "") for p in build(rows, pairs=kind)[0]]
                   for kind in ("best", "all"))
    assert best == ["1>0", "1>2"]
    assert every == ["0>2", "1>0", "1>2", "3>0", "3>2"]


def test_a_margin_is_met_exactly_also_in_floats():
    assert 0.4 - 0.3 > 0.1  # which is what must not happen
    rows = [verified("fiji", s, ["S"] * s + ["NS"] * (10 - s)) for s in (4, 3)]
    for kind in ("best", "all"):
        assert build(rows, margin=0.1, pairs=kind)[0] == []
        assert len(build(rows, margin=0.09, pairs=kind)[0]) == 1


def test_a_target_by_hand():
    cut = verified("fiji", 1, [["NS"], []], ["It is in Asia.", "It has a pop"], finish="length")
    rows = [cut, verified("fiji", 2, ["S"])]
    expected = {"id": "fiji/1", "prompt_id": "fiji", "topic": "Fiji", "kind": "fact",
                "prompt": [{"role": "user", "content": "Tell me about fiji."}],
                "completion": [{"role": "assistant", "content": "It is in Asia."}],
                "finish": "length"}
    first, second = build(rows, "sft")[0]
    assert first == expected and second["finish"] == "stop"
    best, = build(rows, "rft")[0]
    assert best == {**second, "score": 1.0}


def test_sft_takes_all_that_can_be_said_again_and_no_verdict():
    ten = "one two three four five six seven eight nine ten "
    rows = [verified("a", 0, ["S"]), verified("a", 1, ["NS"]), verified("a", 2, ["IR"]),
            verified("a", 3, [None]), verified("a", 4, []),           # nothing judged, and kept
            verified("a", 5, ["S"], ["Response 0 says thing 0."]),         # duplicate
            verified("a", 6, ["S"], [ten * 6 + "end."]),                   # repetitive
            verified("b", 0, [["S"]], ["Cut in its first sent"], finish="length"),
            verified("b", 1, ["S"], abstained=True), verified("c", 0, ["S"])]
    made, prompts, unused = build(rows, "sft")
    assert [row["id"] for row in made] == ["a/0", "a/1", "a/2", "a/3", "a/4", "c/0"]
    assert prompts == {"used": 2, "few": 1}
    assert unused == {"duplicate": 1, "repetitive": 1, "no_sentence": 1, "abstained": 1}
    assert build(map(unlabelled, rows), "sft") == (made, prompts, unused)
    assert all("score" not in row for row in made)


def test_rft_counts_its_reasons_as_facttune_does():
    rows = [verified("a", 0, ["S"]), verified("a", 1, ["NS"]),                      # used
            verified("b", 0, ["S"]), verified("b", 1, ["S"]),                       # tied
            verified("c", 0, ["S"]), verified("c", 1, ["IR"]),                      # few
            verified("d", 0, ["S"]), verified("d", 1, ["S", "NS", None])]           # few: 33 % null
    made, prompts, unused = build(rows, "rft")
    assert [row["id"] for row in made] == ["a/0"]
    assert (prompts, unused) == build(rows)[1:]
    assert prompts == {"used": 1, "tied": 1, "few": 2} and unused == {"no_fact": 1, "unjudged": 1}


def test_statistics_by_hand():
    pairs = build([verified("a", 0, ["S"], ["One two three."]),
                   verified("a", 1, ["NS", "S"], ["One two three four five."]),
                   verified("a", 2, [["NS"], []], ["One.", "Tw"], finish="length")])[0]
    assert prefs.statistics(pairs) == {"chosen": {"words": 3, "stop": 1, "score": 1},
                                       "rejected": {"words": 3, "stop": 0.5, "score": 0.25}}
    targets = build([verified("a", k, ["S"], ["One two."]) for k in range(2)], "sft")[0]
    assert prefs.statistics(targets) == {"completion": {"words": 2, "stop": 1}}


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
    padded["sentences"][0]["facts"] += [{"text": "A borders Chad", "label": "S"}] + [
        {"text": "A borders Chad", "label": "S", "repeats": True}] * 8
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

COMMANDS = {"best": ("facttune",), "all": ("facttune", "--pairs", "all"), "sft": ("sft",),
            "rft": ("rft", "--reward", "f1", "--k", 2)}
ROWS = {"best": 40, "all": 60, "sft": 60, "rft": 20}  # 20 prompts; scores 0, 1/2, 2/3
each_rule = pytest.mark.parametrize("rule", COMMANDS)


def build_prefs(rule, inp, out, *flags):
    return call("04_build_prefs.py", *COMMANDS[rule], "--in", inp, "--out", out, *flags)


@pytest.fixture
def files(tmp_path):
    rows = [verified(f"land{i}-{aspect}", k, ["S"] * (k % 3) + ["NS"], topic=f"Land{i}")
            for i in range(10) for aspect in ("all", "geo") for k in range(3)]
    return write_rows(tmp_path / "v.jsonl", rows), tmp_path / "prefs.jsonl", tmp_path / "held.jsonl"


@each_rule
def test_command_splits_by_topic_and_repeats_itself(files, rule):
    verified_file, out, held = files
    command = rule, verified_file, out, "--eval-out", held
    first = build_prefs(*command)
    assert first.returncode == 0, first.stderr
    train, test = read_rows(out), read_rows(held)
    assert len({row["topic"] for row in test}) == 1
    assert len({row["id"] for row in train + test}) == len(train) + len(test) == ROWS[rule]
    assert not {row["topic"] for row in train} & {row["topic"] for row in test}
    for key, value in {"prompts_in": 20, "  used": 20, "responses_in": 60,
                       "rows": ROWS[rule] * 9 // 10, "rows_held_out": ROWS[rule] // 10,
                       "rows_a_prompt": ROWS[rule] / 20}.items():
        assert f"\n{key + ':':<18}{value}\n" in first.stderr
    written = out.read_bytes(), held.read_bytes()
    assert build_prefs(*command).returncode == 0
    assert (out.read_bytes(), held.read_bytes()) == written
    other = build_prefs(*command, "--seed", 5)
    assert other.returncode == 2 and "--seed 0 -> 5" in other.stderr
    assert (out.read_bytes(), held.read_bytes()) == written
    assert build_prefs(*command, "--seed", 5, "--overwrite").returncode == 0


def test_another_rule_is_another_run(files):
    verified_file, out, _ = files
    assert build_prefs("best", verified_file, out).returncode == 0
    written = out.read_bytes()
    for rule in ("all", "sft", "rft"):
        done = build_prefs(rule, verified_file, out)
        assert done.returncode == 2 and "other flags" in done.stderr and "Trace" not in done.stderr
        assert out.read_bytes() == written


@pytest.mark.parametrize("rule, told", [
    ("best", {"words_chosen": 5, "words_rejected": 5, "stop_chosen": 1, "stop_rejected": 1,
              "score_chosen": 0.67, "score_rejected": 0.25}),
    ("all", {"score_chosen": 0.61, "score_rejected": 0.17}),               # 11/18 and 1/6
    ("sft", {"words_completion": 5, "stop_completion": 1}),
    ("rft", {"words_completion": 5, "words_usable": 5, "score_completion": 0.8,  # S/K = 1
             "score_usable": 0.43, "stop_completion": 1, "stop_usable": 1}),     # 0, 1/2, 4/5
])
def test_what_is_printed(files, rule, told):
    done = build_prefs(rule, *files[:2])
    block = dict(line.strip().split(":") for line in done.stderr.splitlines()[1:])
    assert {name: float(block[name]) for name in told} == pytest.approx(told)
    assert "warning" not in done.stderr
    if rule == "sft":
        assert "score_completion" not in block


def test_rft_counts_as_usable_what_its_prompts_offered(tmp_path):
    """Prompt a: 6 words against a mean of 4. The tied prompt b makes no row and is not told of."""
    long = " ".join(f"word{n}" for n in range(50)) + "."
    rows = [verified("a", 0, ["S"], ["One two three four five six."]),
            verified("a", 1, ["NS"], ["One two."]), verified("a", 2, ["IR"], ["One."]),
            *(verified("b", k, ["S"], [f"B{k} {long}"]) for k in range(2))]
    path = write_rows(tmp_path / "v.jsonl", rows)
    done = build_prefs("rft", path, tmp_path / "p.jsonl")
    for line in ("words_completion: 6.0", "words_usable:     4.0", "  tied:           1"):
        assert line in done.stderr
    assert done.returncode == 0 and "20 %" in done.stderr


def test_02_writes_what_sft_reads(tmp_path):
    """Its rows, unjudged, make targets; the rules that need verdicts name 03."""
    samples = [{"id": f"fiji/{k}", "prompt_id": "fiji", "topic": "Fiji", "prompt": "Fiji?",
                "response": text, "finish": finish} for k, (text, finish) in enumerate([
                    ("Fiji is an island. It lies in the Pacific.", "stop"),
                    ("Fiji is landlocked. It bord", "length"), ("I cannot say.", "stop")])]
    facts, out = tmp_path / "f.jsonl", tmp_path / "p.jsonl"
    inp = write_rows(tmp_path / "s.jsonl", samples)
    assert call("02_decompose.py", "--in", inp, "--out", facts).returncode == 0
    done = build_prefs("sft", facts, out)
    assert done.returncode == 0 and "  abstained:      1" in done.stderr, done.stderr
    assert [(row["completion"][0]["content"], row["finish"]) for row in read_rows(out)] == [
        (samples[0]["response"], "stop"), ("Fiji is landlocked.", "length")]
    for rule in ("best", "rft"):
        done = build_prefs(rule, facts, tmp_path / "q.jsonl")
        assert done.returncode == 2 and f"{facts}:1:" in done.stderr and "03_verify" in done.stderr
    done = build_prefs("sft", inp, tmp_path / "q.jsonl")
    assert done.returncode == 2 and f"{inp}:1:" in done.stderr and "02_decompose" in done.stderr


@pytest.mark.parametrize("words", [
    ("facttune", "--margin", "-0.1"), ("facttune", "--margin", "1"),
    ("facttune", "--margin", "nan"), ("facttune", "--pairs", "some"), ("rft", "--k", "0"),
    ("rft", "--margin", "0.1"), ("sft", "--reward", "f1"), ("sft", "--holdout", "1"),
    ("sft", "--limit", "0"), ("dpo",), (),
])
def test_flags_that_are_refused(files, words):
    verified_file, out, _ = files
    done = call("04_build_prefs.py", *words, "--in", verified_file, "--out", out)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not out.exists()


def test_the_split_is_stable_and_follows_the_seed():
    pairs = [{"topic": f"t{i}"} for i in range(100) for _ in range(3)]
    held = [frozenset(p["topic"] for p in prefs.split_topics(pairs, 0.1, seed)[1])
            for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2] and all(len(topics) == 10 for topics in held)


@each_rule
def test_datasets_reads_the_file_as_trl_expects_it(files, rule):
    """One column type a file: messages under prompt and chosen, rejected or completion."""
    from datasets import load_dataset
    verified_file, out, _ = files
    assert build_prefs(rule, verified_file, out).returncode == 0
    row = load_dataset("json", data_files=str(out), split="train", cache_dir=str(out) + ".d")[0]
    sides = ("chosen", "rejected") if rule in ("best", "all") else ("completion",)
    assert {"chosen", "rejected", "completion"} & set(row) == set(sides)
    for column in ("prompt", *sides):
        assert [m["role"] for m in row[column]] == ["user" if column == "prompt" else "assistant"]
        assert all(set(m) == {"role", "content"} and m["content"] for m in row[column])


@pytest.mark.parametrize("row", [
    {"id": "land3-geo", "prompt": "Other words."},
    {"id": "x", "topic": "LAND3", "prompt": "Other words."},
    {"id": "x", "prompt": [{"role": "user", "content": "Tell me about land3-geo."}]},
])
@each_rule
def test_leakage_is_refused_with_the_ids(files, row, tmp_path, rule):
    verified_file, out, _ = files
    eval_prompts = write_rows(tmp_path / "eval.jsonl", [{"id": "y", "prompt": "z"}, row])
    done = build_prefs(rule, verified_file, out, "--eval-prompts", eval_prompts)
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


@pytest.mark.parametrize("field, value, named", [
    ("finish", None, "finish"), ("label", "T", "label"), ("text!", 3, "text"),
    ("end", 999, "response"),
])
def test_bad_rows_are_named_by_sft_too(tmp_path, field, value, named):
    path = write_rows(tmp_path / "v.jsonl", [verified("a", 0, ["NS"]), broken(field, value)])
    done = build_prefs("sft", path, tmp_path / "p.jsonl")
    assert done.returncode == 2 and f"{path}:2: expected" in done.stderr, done.stderr
    assert named in done.stderr and not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("change", [{"prompt": "Something else."}, {"topic": "Peru"}])
def test_one_prompt_id_means_one_prompt_and_topic(tmp_path, change):
    """Else the rows of one prompt might fall on both sides of the split."""
    rows = [verified("a", 0, ["S"]), {**verified("a", 1, ["NS"]), **change}]
    path = write_rows(tmp_path / "v.jsonl", rows)
    done = build_prefs("best", path, tmp_path / "p.jsonl")
    assert done.returncode == 2 and f"{path}:2:" in done.stderr


def test_a_topic_may_be_absent(tmp_path):
    rows = [verified("a", 0, ["S"]), verified("a", 1, ["NS"])]
    path = write_rows(tmp_path / "v.jsonl", [{f: row[f] for f in row if f != "topic"}
                                             for row in rows])
    for rule in COMMANDS:
        out = tmp_path / f"{rule}.jsonl"
        assert build_prefs(rule, path, out).returncode == 0
        assert {row["topic"] for row in read_rows(out)} == {"a"}


@pytest.mark.parametrize("rule", ["best", "all", "rft"])
def test_no_rows_is_said_and_nothing_is_written(tmp_path, rule):
    path = write_rows(tmp_path / "v.jsonl", [verified("a", k, ["S"]) for k in range(3)])
    out = tmp_path / "p.jsonl"
    done = build_prefs(rule, path, out)
    assert done.returncode == 2 and "no rows" in done.stderr and "  tied:  " in done.stderr
    assert list(tmp_path.iterdir()) == [path]
    assert build_prefs("sft", path, out).returncode == 0 and len(read_rows(out)) == 3
    alone = build_prefs("sft", path, tmp_path / "q.jsonl", "--eval-out", tmp_path / "held.jsonl")
    assert alone.returncode == 2 and "no rows" in alone.stderr
    assert "rows_held_out:    3" in alone.stderr and not (tmp_path / "held.jsonl").exists()


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
