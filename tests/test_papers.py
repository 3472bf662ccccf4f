"""04's rules of FactTune-MC, FLAME, FactAlign and APEFT, worked out by hand from the papers."""
import os
import random
from collections import Counter

import pytest
from conftest import call, read_rows, stage, write_rows
from test_prefs import build, unlabelled, verified

prefs = stage("04_build_prefs")
LETTERS = {"S": "S", "N": "NS", "I": "IR", "-": None}
TEN = "one two three four five six seven eight nine ten "


def response(k, marks="S", name="peru", **more):
    """A row of 03. marks: a letter a fact, the sentences apart by |."""
    return verified(name, k, [[LETTERS[x] for x in part] for part in marks.split("|")], **more)


def said(row, side="completion"):
    return row[side][0]["content"]


def turn(text, role="assistant"):
    return {"role": role, "content": text}


def ids(rows, kind=None):
    return [row["id"] for row in rows if kind in (None, row["kind"])]


@pytest.fixture
def built(tmp_path):
    """built(rows or files, rule, *flags) -> (the finished process, the rows of --out or None)."""
    def command(rows, rule, *flags, **kwargs):
        inp = rows if isinstance(rows, tuple) else [write_rows(tmp_path / "v.jsonl", rows)]
        made = "--in", *inp, "--out", tmp_path / "prefs.jsonl", "--overwrite"
        done = call("04_build_prefs.py", rule, *made, *flags, **kwargs)
        assert "Traceback" not in done.stderr, done.stderr
        return done, None if done.returncode else read_rows(made[-2])
    return command


# FactTune-MC --------------------------------------------------------------------------------------
def sure(k, *confs):
    """A response whose facts have no label: (max, exp, neg_ent), None for no answers, or "none"."""
    row = unlabelled(response(k, "-" * len(confs)))
    for fact, conf in zip(prefs.facts_of(row), confs):
        if conf != "none":
            fact["conf"] = conf and dict(zip(("max", "exp", "neg_ent"), conf))
    return row


@pytest.mark.parametrize("reward, best, scores", [
    ("max", 0, [.75, .5]), ("exp", 1, [.6, .5]), ("neg_ent", 1, [-.25, -.5])])
def test_confidence_is_the_mean_over_distinct_facts(built, reward, best, scores):
    rows = [sure(0, (.5, .1, -1), (1, .9, 0), (0, 0, -9), "none"), sure(1, (.5, .6, -.25))]
    prefs.facts_of(rows[0])[2]["repeats"] = True
    pair, = built(rows, "facttune", "--reward", reward)[1]
    assert pair["id"] == f"peru/{best}>peru/{1 - best}"
    assert [pair["score_chosen"], pair["score_rejected"]] == pytest.approx(scores)
    done, _ = built(rows, "facttune")  # the verdicts, which these rows do not have
    assert done.returncode == 2 and "v.jsonl:1: expected a fact" in done.stderr


def test_facts_without_answers_are_unjudged_and_those_that_ask_nothing_are_not_there():
    low, half = (.25, .2, -1), (.5, .5, -1)
    rows = [sure(0, half, half, half, low, None),            # 1 of 5: the mean of four
            sure(1, half, half, half, None, *["none"] * 9),  # 1 of the 4 that ask: too many
            sure(2, "none"), sure(3, low), sure(4, half)]
    pairs, prompts, unused = build(rows, reward="max", pairs="all")
    assert ids(pairs) == ["peru/0>peru/3", "peru/4>peru/0", "peru/4>peru/3"]
    assert pairs[0]["score_chosen"] == .4375 and unused == {"unjudged": 1, "no_fact": 1}


# FLAME --------------------------------------------------------------------------------------------
def rated(k, rating, marks="S", name="peru"):
    return response(k, marks, name, rating=rating, fact_based=name != "poem")


def test_flame_sft_by_hand():
    rows = [rated(0, None), {**rated(1, None), "abstained": True}, rated(0, None, name="poem")]
    given = [{"id": "g1", "prompt": "Write a poem.", "response": "Roses are red."},
             {"id": "g2", "prompt": "Fiji?", "response": "Oceania.", "fact_based": True}]
    made, prompts, unused = build(rows, "flame_sft", given=given)
    assert [(row["id"], row["kind"], said(row)) for row in made] == [
        ("peru/0", "fact", "Response 0 says thing 0."), ("g1", "if", "Roses are red.")]
    assert made[1]["prompt"] == [turn("Write a poem.", "user")] and made[1]["finish"] == "stop"
    assert prompts == {"used": 1, "not_asked": 1} and unused == {"abstained": 1}
    made, prompts, _ = build(rows, "flame_sft", given=given, targets="given")
    assert [(row["id"], row["kind"]) for row in made] == [("g1", "if"), ("g2", "fact")]
    assert prompts == {"not_asked": 2}


@pytest.mark.parametrize("ratings, pair", [
    ([3, 5, 5, 1, 1], "1>3"), ([2, 4], "1>0"), ([None, 3, 2, None], "1>2"),
    ([3, 3, 3], "tied"), ([4, None], "few"), ([4], "few")])
def test_flame_pairs_by_rating(ratings, pair):
    """The first of the highest over the first of the lowest."""
    rows = [rated(k, rating, "-", "poem") for k, rating in enumerate(ratings)]
    made, prompts, unused = build(rows, "flame")
    assert [row["id"].replace("poem/", "") for row in made] == [f"{pair} if"] * (">" in pair)
    fate = "used" if made else pair
    assert (prompts[f"if_{fate}"], unused["if_unjudged"]) == (1, ratings.count(None))


@pytest.mark.parametrize("best, worst, kept", [(3, 3, 1), (4, 3.5, 1), (3.5, 4, 1), (4.4, 3.9, 1),
                                               (4, 3.33, 0),
                                               (1, 5, 0), (None, 3, 0), (3, None, 0)])
def test_flame_pairs_by_precision_must_be_rated_alike(best, worst, kept):
    """Of precisions .5, 1, 0, .5, 0 the second over the third."""
    rows = map(rated, range(5), (2, best, worst, 2, 5), ("SN", "SS", "N", "NS", "NN"))
    made, prompts, _ = build(rows, "flame")
    assert ids(made, "fact") == ["peru/1>peru/2"] * kept
    assert (prompts["fact_used"], prompts["fact_far"]) == (kept, not kept)


def test_flame_of_both_kinds(built):
    """One pair of responses may be preferred for both reasons; a poem needs no verdict."""
    poems = [unlabelled(rated(k, k, name="poem")) for k in (1, 2)]
    rows = [rated(0, 4.5, "S"), rated(1, 4, "N"), rated(2, 4.2, "SN"), rated(0, 4, name="one"),
            *(rated(k, 4, name="tied") for k in range(2)), *poems]
    _, made = built(rows, "flame")
    assert [(row["kind"], *row["from"], row["score_chosen"], row["score_rejected"])
            for row in made] == [("if", "peru/0", "peru/1", 4.5, 4), (
                "if", "poem/2", "poem/1", 2, 1), ("fact", "peru/0", "peru/1", 1, 0)]
    assert len(set(ids(made))) == 3 and +build(rows, "flame")[1] == {
        "if_used": 2, "if_tied": 1, "if_few": 1, "fact_used": 1, "fact_tied": 1, "fact_few": 1}
    del rows[1]["rating"]
    done, _ = built(rows, "flame")
    assert done.returncode == 2 and "v.jsonl:2: expected a 'rating' (03_verify.py" in done.stderr


# FactAlign ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("marks, k, f1", [  # 2PR/(P+R), P = S/(S+NS), R = min(S/K, 1)
    ("SSSN", 4, .75), ("SS", 4, 2 / 3), ("SSSSSSNN", 4, 6 / 7), ("SSSNIII", 4, .75),
    ("NN", 4, 0), ("SN", 1, 2 / 3), ("SSS-", 4, None), ("SSSS-", 8, 2 / 3)])
def test_a_response_is_good_above_t(marks, k, f1):
    """Irrelevant facts leave F1@K alone; > 20 % null: no row. t itself is not above t."""
    for t in (.5, .74, .75, .8):
        made, _, unused = build([response(0, marks)], "factalign", k=k, t=t)
        assert [(row["label"], row["score"]) for row in made] == (
            [] if f1 is None else [(f1 > t, pytest.approx(f1))])
        assert unused["unjudged"] == (f1 is None)


def test_bad_whatever_the_facts_say():
    """Abstaining, fact-less, one 10-gram six times; five are good. Without a sentence: no row."""
    rows = [response(0, "SSSS", abstained=True), response(1, ""), response(2, "I"),
            *(response(k, "SSSS", sentences=[TEN * n + "end."]) for k, n in ((3, 6), (4, 5))),
            response(5, "SSSS", sentences=["It has"], finish="length"),
            response(6, "N", sentences=["Response 1 says thing 0."])]
    made, _, unused = build(rows, "factalign", k=4)
    assert [(row["id"], row["label"], row["score"]) for row in made] == [
        (f"peru/{k}", k == 4, k == 4) for k in range(5)]
    assert unused == {"no_sentence": 1, "duplicate": 1}
    assert {made[1][f"sentence_{name}"] for name in ("label", "spans")} == {None}


@pytest.mark.parametrize("marks, t_s, label", [
    ("S" * 14 + "N" * 11, .56, True),  # in floats, .56 * 25 is more than 14
    ("SS", 1, True), ("SN", 1, False), ("SN", .5, True), ("SI", 1, False), ("SNN", .34, False),
    ("SII", .33, True), ("I", .1, False), ("S-", .5, None), ("-", 0, None), ("", 0, None),
    ("N", 0, True)])
def test_a_sentence_is_good_from_t_s_on(marks, t_s, label):
    """An irrelevant fact is a 0 in the mean; no facts, or one unjudged: no label."""
    row, = build([response(0, f"SSSSSSSSS|{marks}|N")], "factalign", k=4, t_s=t_s)[0]
    found = zip(row["completion_sentences"], row["sentence_label"], strict=True)
    expected = zip((f"Response 0 says thing {n}." for n in range(3)), (True, label, t_s == 0))
    assert list(found) == [(text, mark) for text, mark in expected if mark is not None]


def test_said_before_and_said_over_and_over():
    """The second time a sentence is bad, also without facts; so is a 10-gram four times in one."""
    texts = ["It is big.", TEN * 3 + "end.", TEN * 4 + "end.", "It."]
    row = response(0, "S|S|S|", sentences=texts)
    row["response"] = row["response"].removesuffix("It.") + texts[0]
    row["sentences"][3]["end"] += len(" is big")
    made, = build([row], "factalign", k=4)[0]
    assert made["completion_sentences"] == [*texts[:3], texts[0]]
    assert made["sentence_label"] == [True, True, False, False]


@pytest.mark.parametrize("before", ["", "  \n", "<think>Hm. It is.</think>\n\n"])
@pytest.mark.parametrize("finish, whole", [("stop", 3), ("length", 2)])
def test_spans_are_of_the_completion(before, finish, whole):
    texts = ["It is big.", "It is.  Big!", "It is big, and"]
    row = response(0, "S||N", sentences=texts, finish=finish)
    row["response"] = before + row["response"]
    row["sentences"] = [{**s, "start": s["start"] + len(before), "end": s["end"] + len(before)}
                        for s in row["sentences"]]
    made, = build([row], "factalign", k=4)[0]
    assert said(made) == " ".join(texts[:whole]) and made["finish"] == finish
    cut = [said(made)[start:end] for start, end in made["sentence_spans"]]
    assert cut == made["completion_sentences"] == texts[:whole:2]
    assert made["sentence_label"] == [True, False][:len(cut)]


def test_balance_against_every_threshold():
    rng = random.Random(0)
    for trial in range(200):
        scores = [rng.choice([0, .2, .25, .5, 1]) for _ in range(rng.randint(1, 9))]
        good = {sum(score > t for score in scores) for t in (-1, *scores)}
        found = sum(score > prefs.threshold(scores) for score in scores)
        assert abs(2 * found - len(scores)) == min(abs(2 * n - len(scores)) for n in good), scores
    rows = [response(s, "S" * s + "N" * (4 - s), f"p{s}") for s in range(5)]  # F1 0, 1/4 ... 1
    made, _, _ = build([*rows, response(5, "")], "factalign", k=4, balance=True)  # and 0
    assert [(row["t"], row["label"]) for row in made] == [(.25, s in (2, 3, 4)) for s in range(6)]
    made, _, _ = build([response(0), response(1)], "factalign", k=4, balance=True)
    assert [row["label"] for row in made] == [False] * 2  # all alike: nothing lies above


@pytest.mark.parametrize("share, precise", [(0, 0), (.25, 5), (.5, 10), (1, 20)])
def test_precision_share(share, precise):
    """P = 1/2, R = 2/8 and F1 = 1/3 tell by which metric a prompt's two responses were scored."""
    rows = [response(k, "SSNN", f"p{n}") for n in range(20) for k in range(2)]
    one, same, other = ({row["id"]: row["score"] for row in build(
        rows, "factalign", k=8, precision_share=share, seed=seed)[0]} for seed in (0, 0, 5))
    assert one == same and len(one) == 40 and (one != other) == (0 < share < 1)
    scores = [(one[f"p{n}/0"], one[f"p{n}/1"]) for n in range(20)]
    assert scores.count((.5, .5)) == precise
    assert scores.count((.25, .25) if share else (1 / 3, 1 / 3)) == 20 - precise
    rows = [response(s, "S" * s + "N" * (8 - s), f"p{n}") for n in range(8) for s in range(1, 5)]
    made, _, _ = build(rows, "factalign", k=16, precision_share=.5, balance=True)
    assert Counter((row["t"], row["label"]) for row in made) == dict.fromkeys(  # each its own t
        [(2 / 8, True), (2 / 8, False), (2 / 16, True), (2 / 16, False)], 8)


def test_rounds_together_and_the_weights_that_balance_them(built, tmp_path):
    """Sums of weights are alike on either side, of rows and of sentences, held-out ones apart."""
    rounds = tuple(write_rows(tmp_path / f"{r}.jsonl", [response(
        k, "S|S|S" + "|N" * k, f"r{r}-{n}") for n in range(5) for k in range(1, 3 + n)])
        for r in range(2))
    flags = "--k", 3, "--t", .75, "--eval-out", tmp_path / "held.jsonl"  # F1: 6/7, 6/8, 6/9 ...
    done, made = built(rounds, "factalign", *flags)
    rows, bad = len(made), sum(int(row["id"][-1]) for row in made)  # sentences: 3 good, k bad
    assert rows + len(read_rows(flags[-1])) == 2 * (2 + 3 + 4 + 5 + 6)
    assert done.stdout.split() == ["--undesirable-weight", f"{9 / (rows - 9):.4f}",
                                   "--sentence-undesirable-weight", f"{3 * rows / bad:.4f}"]
    done, made = built([response(0)], "factalign", "--k", 1)
    assert len(made) == 1 and done.stdout.strip() == ""  # one side only: no weight balances that


ASK, YES, NO = turn("Hi?", "user"), turn("Yes."), turn("No.")
TALK = [ASK, turn("Hello."), turn("Why?", "user")]
BOTH = {"chosen": [*TALK, YES], "rejected": [*TALK, NO], "score_chosen": 8.5, "score_rejected": 6.0}
GENERAL = "factalign", "--k", 1, "--general"


def test_general_rows_by_hand(built, tmp_path):
    rows = [*({"rating": rating, "response": f" {rating} "} for rating in (
        5, 4, 3.99, 3, None, 2.01, 2, 1)), {"rating": 5, "response": " "},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"chosen": [ASK, YES], "rejected": [ASK, NO]}, {"chosen": [YES], "rejected": [YES]},
        {"completion": [YES], "label": True}, {"completion": [NO], "label": False}]
    path = write_rows(tmp_path / "general.jsonl", [{"id": f"g{n}", "prompt": "Hi?", **row}
                                                   for n, row in enumerate(rows)])
    _, (own, *made) = built([response(0)], *GENERAL, path)
    assert all(row["kind"] == "general" and row["prompt"] == [ASK] for row in made)
    assert [(row["id"], row["label"], said(row)) for row in made] == [
        ("g0", True, "5"), ("g1", True, "4"), ("g6", False, "2"), ("g7", False, "1"),
        ("g9/chosen", True, "Yes."), ("g9/rejected", False, "No."), ("g10/chosen", True, "Yes."),
        ("g10/rejected", False, "No."), ("g12", True, "Yes."), ("g13", False, "No.")]


@pytest.mark.parametrize("rows, split, other, prompt_ids", [
    ([{"prompt": "Why?", "prompt_id": f"u{n}", "messages": [*TALK, YES], **BOTH} for n in range(2)],
     "train_prefs", "test_prefs", ["u0", "u0", "u1", "u1"]),       # UltraFeedback-binarized
    ([{"prompt": TALK, "completion": [answer], "label": answer == YES} for answer in (YES, NO)],
     "train", "test", ["general-0", "general-1"])], ids=["ultrafeedback", "kto-mix"])
def test_general_data_through_datasets(built, tmp_path, rows, split, other, prompt_ids):
    from datasets import Dataset
    for name, some in ((split, rows), (other, rows[:1])):
        Dataset.from_list(some).to_parquet(tmp_path / f"hub/data/{name}-00000-of-00001.parquet")
    offline = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    _, (own, *made) = built([response(0)], *GENERAL, f"{tmp_path}/hub:{split}", env=offline)
    assert [(row["prompt_id"], row["label"], said(row), row["prompt"]) for row in made] == [
        (name, n % 2 == 0, ("Yes.", "No.")[n % 2], TALK) for n, name in enumerate(prompt_ids)]


@pytest.mark.parametrize("rule, row", [
    *[(GENERAL, {**row, "label": True}) for row in (
        {}, {"completion": "x"}, {"completion": []}, {"completion": [turn(None)]})],
    *[(GENERAL, row) for row in ({"response": "x"}, {"rating": 3}, {"completion": [YES]}, {
        "chosen": [YES]}, {"completion": [YES], "label": "True"}, {"rating": "5", "response": "y"},
        {"chosen": [YES], "rejected": "y"}, {"chosen": [], "rejected": [YES]},
        {"chosen": ["a"], "rejected": [YES]})],
    (("flame-sft", "--given"), {}), (("apeft", "--answers"), {"prompt_id": "x"})])
def test_bad_rows_of_other_files(built, tmp_path, rule, row):
    good = {"prompt": "x", "rating": 5, "response": "y", "prompt_id": "x", "topic": "y"}
    path = write_rows(tmp_path / "more.jsonl", [good, {"prompt": "x", **row}])
    done, _ = built([response(0)], *rule, path)
    assert done.returncode == 2 and f"{path}:2: expected" in done.stderr


# APEFT --------------------------------------------------------------------------------------------
BORDERS = {"topic": "Peru", "prompt": "State one fact about Peru.", "prefix": "Peru borders"}
CAPITAL = {"topic": "Peru", "prompt": [turn("Be brief.", "system"), ASK], "question": "Which?"}
ANSWERS = [{**row, "id": f"{name}/{k}", "prompt_id": name}
           for name, row in (("q-b", BORDERS), ("q-c", CAPITAL)) for k in range(2)]
HALF = "potentially", "Chile S 2, Bolivia S 2, Mars IR 9, Spain NS 1, Japan NS 2, Cuba NS 2"


def peru(k, marks, *facts, name="peru", topic="Peru"):
    """A response, its first facts asked about: (question's row, own answer, known, answers)."""
    row = response(k, marks, name, topic=topic)
    for fact, (question, own, known, answers) in zip(prefs.facts_of(row), facts):
        fact |= {key: question[key] for key in ("prefix", "question") if key in question}
        fact |= {"answer": own, "r": known and .5, "known": known, "answers": [
            dict(zip(("text", "label", "count"), (*told.split()[:2], int(told[-1]))))
            for told in answers.split(", ") if told]}
    return row


def test_an_atomic_pair_by_hand():
    """The commonest right answer over the commonest wrong one, the first of equals."""
    capital = CAPITAL, "Lima", "potentially", "Rome NS 1, Lima S 1"
    (pair, borders, capital), prompts, _ = build([  # two responses ask about the borders: one pair
        peru(0, "SS", (BORDERS, "Chile", *HALF), capital), peru(1, "N", (BORDERS, "Japan", *HALF))],
        "apeft", answers=ANSWERS)
    assert pair["id"] == "peru/0>peru/1" and prompts == {"used": 1, "facts_potentially_used": 2}
    assert borders == {
        "id": "q-b", "prompt_id": "q-b", "topic": "Peru", "kind": "atomic", "r": .5,
        "from": ["q-b right", "q-b wrong"], "prefix": "Peru borders",
        "prompt": [turn("State one fact about Peru.", "user")], "score_chosen": 1,
        "chosen": [turn("Peru borders Chile")], "rejected": [turn("Peru borders Japan")],
        "score_rejected": 0, "finish": {"chosen": "length", "rejected": "length"}}
    assert (capital["prompt"], capital["prefix"]) == (CAPITAL["prompt"], "")
    assert (capital["chosen"], capital["rejected"]) == ([turn("Lima")], [turn("Rome")])


@pytest.mark.parametrize("how, asked", [
    ({}, 1), ({"pairs": "all"}, 1), ({"margin": .4}, 1), ({"margin": .5}, 0),
    ({"reward": "f1", "k": 2, "margin": .4}, 1), ({"reward": "f1", "k": 4, "margin": .4}, 0)])
def test_pairs_are_facttunes_and_only_answered_facts_of_their_responses_count(how, asked):
    """The middle one asks; scores 1, 1/2, 0, by F1@4 2/3, 1/3, 0. Tied and lone ones count not."""
    ask = CAPITAL, "Lima", *HALF
    rows = [peru(0, "SS", (BORDERS, "Chile", None, "")), peru(1, "SN", ask), peru(2, "NN"),
            *(peru(k, "S", ask, name="tied") for k in range(2)), peru(0, "S", ask, name="one")]
    pairs, prompts, unused = build(rows, **how)
    for other in ({}, {"topic": "Chile"}, {"question": "Who?"}):
        found = build(rows, "apeft", answers=[{**row, **other} for row in ANSWERS], **how)
        kept = ["q-c"] * (asked and not other)
        assert (found[0][:len(pairs)], ids(found[0][len(pairs):])) == (pairs, kept)
        assert found[1:] == (prompts + Counter(facts_potentially_used=len(kept)), unused)


@pytest.mark.parametrize("known, answers, own, pair", [
    (*HALF, ("Lima", "Rome"), ("Chile", "Japan")),
    ("unknown", "Oslo NS 1, Bonn NS 3", ("Lima", "Rome"), ("Lima", "Bonn")),
    ("known", "Lima S 4", ("Callao", "Rome"), ("Lima", "Rome")),
    ("unknown", "Oslo NS 1", (None, "Rome"), None), ("known", "Lima S 4", ("Lima", None), None)])
def test_keep(known, answers, own, pair):
    rows = [peru(k, "SN"[k], *[(CAPITAL, own[k], known, answers)] * bool(own[k])) for k in (0, 1)]
    for keep in ("unknown", "potentially", "known"):
        (_, *made), prompts, _ = build(rows, "apeft", answers=ANSWERS, keep=keep)
        kept = [pair] if keep == known and pair else []
        assert [(said(row, "chosen"), said(row, "rejected")) for row in made] == kept
        assert prompts == {"used": 1, f"facts_{known}" + "_used" * len(kept): 1}


def test_each_side_once_a_label(built, tmp_path):
    """1 over 0, 2 over 0, 2 over 1 and an atomic pair: six rows, not eight."""
    rows = [peru(k, marks, (BORDERS, "x", *HALF)) for k, marks in enumerate(["NN", "SN", "SS"])]
    flags = "--pairs", "all", "--unpaired", "--answers", write_rows(tmp_path / "a", ANSWERS)
    done, made = built(rows, "apeft", *flags)
    assert sorted((said(row)[:10], row["label"], row.get("prefix")) for row in made) == [
        ("Peru borde", good, "Peru borders") for good in (False, True)] + [
        (f"Response {k}", k > n, None) for k, n in ((0, 0), (1, 1), (1, 0), (2, 0))]
    assert len(set(ids(made))) == 6 and done.stdout == "--undesirable-weight 1.0000\n"


@pytest.mark.parametrize("rule, more, name, words", [
    (("apeft", "--answers"), ANSWERS, "q-b", "State one fact about Peru."),
    (GENERAL, [{"id": "g", "prompt": "Hi?", "completion": [YES], "label": True}], "g", "Hi?"),
    (("flame-sft", "--given"), [{"id": "g", "prompt": [ASK], "response": "x"}], "g", "Hi?")])
def test_leakage_is_refused_for_every_kind(built, tmp_path, rule, more, name, words):
    rows = [peru(0, "S", (BORDERS, "Chile", *HALF)), peru(1, "N")]
    command = *rule, write_rows(tmp_path / "more.jsonl", more), "--eval-prompts"
    for n, (one, prompt) in enumerate([("x", "y"), (name, "y"), ("x", words)]):
        asked = write_rows(tmp_path / "eval.jsonl", [{"id": one, "prompt": prompt}])
        done, _ = built(rows, *command, asked)
        assert done.returncode == 2 * bool(n) and (f"found 1: {name}\n" in done.stderr) == bool(n)


def test_all_kinds_of_a_topic_are_held_out_together(built, tmp_path):
    asked = [{**BORDERS, "prompt_id": f"q{n}", "topic": f"Land{n}"} for n in range(10)]
    rows = [peru(k, "SN"[k], (row, "x", *HALF), name=f"{row['topic']}-{part}",
                 topic=row["topic"]) for row in asked for part in "xy" for k in range(2)]
    flags = "--answers", write_rows(tmp_path / "a", asked), "--eval-out", tmp_path / "held"
    _, train = built(rows, "apeft", *flags, "--holdout", .3)
    for part, size in ((train, 7), (read_rows(tmp_path / "held"), 3)):
        topics = sorted({row["topic"] for row in part})
        assert len(topics) == size and sorted((row["topic"], row["kind"]) for row in part) == [
            (topic, kind) for topic in topics for kind in ("atomic", "fact", "fact")]


def test_from_questions_to_pairs(built, tmp_path):
    def step(script, inp, out, *flags):
        done = call(script, "--in", tmp_path / inp, "--out", tmp_path / out, *flags)
        assert done.returncode == 0, done.stderr

    corpus = "--corpus", write_rows(tmp_path / "c.jsonl", [
        {"title": "Peru", "field": "Land boundaries", "text": "border countries: Chile 168 km"},
        {"title": "Peru", "field": "Capital", "text": "name: Lima"}])
    write_rows(tmp_path / "samples", [
        {"id": f"peru/{k}", "prompt_id": "peru", "topic": "Peru", "prompt": "Peru?",
         "response": f"{text}The capital of Peru is Lima.", "finish": "stop"}
        for k, text in enumerate(["Peru borders Japan. ", "Peru borders Chile. ", ""])])
    step("02_decompose.py", "samples", "facts", "--questions-out", tmp_path / "questions")
    answers = "--answers", write_rows(tmp_path / "answers", [
        {**row, "id": f"{row['id']}/{k}", "prompt_id": row["id"], "finish": "stop",
         "response": text if row["prefix"] == "Peru borders" else "Lima."}
        for row in read_rows(tmp_path / "questions")
        for k, text in enumerate(["Japan", "Chile", "Japan", "Japan"])])
    step("03_verify.py", "facts", "judged", *corpus)
    step("03_verify.py", "judged", "known", "--method", "answers", *answers, *corpus)
    _, (*made, pair) = built((tmp_path / "known",), "apeft", *answers)
    assert pair["id"] == "peru/1>peru/0" and [
        (row["r"], said(row, "chosen"), said(row, "rejected")) for row in made] == [
        (.25, "Peru borders Chile", "Peru borders Japan")]
    step("03_verify.py", "facts", "sure", "--method", "confidence", *answers)
    pair, _ = built((tmp_path / "sure",), "facttune", "--reward", "max")[1]
    assert pair["id"] == "peru/2>peru/0" and pair["score_rejected"] == .875  # (3/4 + 1) / 2
