"""06: every number against one that was worked out by hand or by another program."""
import json
import math
import os
import random

import numpy as np
import pytest
from conftest import call, stage, write_rows

from data import pictures

ev = stage("06_eval")


def facts(labels, kinds=None, text="claim"):
    """One sentence of distinct facts labelled as in "S NS IR -" (- is null)."""
    made = []
    for i, label in enumerate(labels.split()):
        made.append({"text": f"{text} number {i}", "label": None if label == "-" else label})
        if kinds:
            made[-1]["kind"] = kinds.split()[i]
    return [{"facts": made}]


def row(prompt, k, labels, kinds=None, **more):
    topic = prompt.split("-")[0].title()
    return {"id": f"{prompt}/{k}", "prompt_id": prompt, "topic": topic, "finish": "stop",
            "response": "five words in a row", "abstained": False,
            "sentences": facts(labels, kinds), **more}


def score(tmp_path, rows, *flags):
    path = write_rows(tmp_path / "v.jsonl", rows)
    done = call("06_eval.py", "score", "--in", path, "--k", 4, "--json", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def means(found):
    return {name: metric["mean"] for name, metric in found["metrics"].items()}


# Formulas

@pytest.mark.parametrize("s, ns, k, expected", [  # SAFE's own code
    (40, 10, 64, .701754), (40, 10, 100, .533333), (70, 30, 64, .823529), (0, 5, 64, 0),
    (0, 0, 64, 0), (64, 0, 64, 1), (200, 0, 64, 1), (1, 0, 178, .011173)])
def test_f1_at_k_golden(s, ns, k, expected):
    assert ev.f1_at_k(s, ns, k) == pytest.approx(expected, abs=1e-6)


def test_length_penalty_golden():  # FActScore's own code, gamma 10; continuous at 10
    assert ev.length_penalty(5) == pytest.approx(.367879, abs=1e-6)
    assert ev.length_penalty(1) == pytest.approx(.000123, abs=1e-6)
    assert ev.length_penalty(10) == ev.length_penalty(11) == 1
    assert ev.length_penalty(5, gamma=5) == 1


# score

def test_score_by_hand(tmp_path):
    rows = [
        row("chad-all", 0, "S S NS IR"),  # precision 2/3, F1@4 of (2/3, 1/2) = 4/7, factscore 1/2
        row("chad-all", 1, "", response=""),           # empty: F1@4 0, no precision
        row("chad-geo", 0, "NS NS", finish="length"),  # 0, 0
        row("peru-all", 0, "S S S S S -"),             # null 1/6: precision 1, F1@4 1
        row("peru-all", 1, "S S S -"),                 # null 1/4: unjudged
        row("peru-geo", 0, "IR"),                      # F1@4 0, factscore 0, but it responded
        row("peru-geo", 1, "", response="I do not know.", abstained=True)]
    found = score(tmp_path, rows)
    assert (found["n_prompts"], found["n_responses"], found["n_topics"]) == (4, 7, 2)
    assert (found["k"], found["label"]) == (4, "label")
    got = means(found)
    assert got["f1_at_k"] == pytest.approx((4 / 7 / 2 + 0 + 1 + 0) / 4)
    assert got["precision"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert got["precision_pooled"] == pytest.approx(7 / 10)
    assert got["factscore"] == pytest.approx((1 / 2 + 0 + 1 + 0) / 4)
    by_n = [math.exp(1 - 10 / n) for n in (4, 2, 5, 1)]
    assert got["factscore_penalised"] == pytest.approx((by_n[0] / 2 + by_n[2]) / 4)
    assert got["supported"] == pytest.approx((1 + 0 + 5 + 0) / 4)      # unjudged out, silence is 0
    assert got["unsupported"] == pytest.approx((.5 + 2 + 0 + 0) / 4)
    assert got["irrelevant"] == pytest.approx((1 / 4 + 0 + 0 + 1) / 4)
    assert got["facts"] == pytest.approx((4 + 2 + 5 + 1) / 4)          # over those that responded
    assert got["responded"] == pytest.approx((.5 + 1 + 1 + .5) / 4)
    assert got["unjudged"] == pytest.approx((0 + 0 + .5 + 0) / 4)
    assert got["cut_by_length"] == pytest.approx(1 / 4)
    assert got["words"] == pytest.approx((2.5 + 5 + 5 + 4.5) / 4)


def test_facts_counts_null_ones(tmp_path):
    assert means(score(tmp_path, [row("chad-all", 0, "S S S S S -")]))["facts"] == 6


def test_exactly_a_fifth_null_is_judged(tmp_path):
    assert means(score(tmp_path, [row("chad-all", 0, "S NS NS NS -")]))["precision"] == 1 / 4
    assert means(score(tmp_path, [row("chad-all", 0, "S NS NS NS - -")]))["precision"] is None


def test_nothing_judged_is_null_with_a_reason(tmp_path):
    for rows in ([row("chad-all", 0, "- -")], [row("chad-all", 0, "", abstained=True)]):
        metric = score(tmp_path, rows)["metrics"]["precision"]
        assert metric["mean"] is metric["lo"] is metric["hi"] is None
        assert "1 responses" in metric["reason"]
    assert means(score(tmp_path, [row("chad-all", 0, "", abstained=True)]))["f1_at_k"] == 0
    assert means(score(tmp_path, [row("chad-all", 0, "- -", abstained=True)]))["f1_at_k"] is None


def test_repeated_facts_count_once(tmp_path):
    for field, expected in (("label", (2, 1, 1, 2 / 4)), ("human", (4, 2, 2, None))):
        made = [{"text": "Chad borders Libya", field: "S"}, {"text": "same", field: "NS",
                "repeats": True}, {"text": "same", field: "S", "repeats": True},
                {"text": "Chad exports oil", field: "NS"}]
        got = means(score(tmp_path, [row("chad-all", 0, "", sentences=[{"facts": made}])]))
        names = ("facts", "supported", "unsupported", "repeated")
        assert tuple(got[name] for name in names) == expected


def test_label_wins_over_human_and_is_named(tmp_path):
    both = [{"text": text, "label": "S", "human": "NS"} for text in ("a b", "c d")]
    found = score(tmp_path, [row("chad-all", 0, "") | {"sentences": [{"facts": both}]}])
    assert found["label"] == "label" and means(found)["precision"] == 1
    human = [{"text": f["text"], "human": f["human"]} for f in both]
    found = score(tmp_path, [row("chad-all", 0, "") | {"sentences": [{"facts": human}]}])
    assert found["label"] == "human" and means(found)["precision"] == 0


def test_kinds_by_hand(tmp_path):
    rows = [row("chad-all", 0, "S NS S NS", "border border place direction"),  # without: S
            row("peru-all", 0, "NS NS", "region border"),                      # without: NS
            row("cuba-all", 0, "S", "border"),                                 # without: nothing
            row("iran-all", 0, "NS - - -", "place border border border")]      # unjudged anyway
    found = score(tmp_path, rows)
    got, kinds = means(found), found["by_kind"]
    assert sorted(kinds) == ["border", "direction", "place", "region"]
    assert kinds["border"]["share"]["mean"] == pytest.approx((2 / 4 + 1 / 2 + 1 + 3 / 4) / 4)
    assert kinds["border"]["precision"]["mean"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert kinds["place"]["precision"]["mean"] == 1
    assert got["precision_without_border_direction"] == pytest.approx((1 + 0) / 2)
    without = got["f1_at_k_without_border_direction"]  # of (1, 1/4): 2/5
    assert without == pytest.approx((2 / 5 + 0 + 0) / 3)
    assert got["precision_without_region"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert got["precision_without_vague"] == got["precision"]


def test_no_kinds_no_figures_without_them(tmp_path):
    found = score(tmp_path, [row("chad-all", 0, "S NS")])
    assert found["by_kind"] == {} and means(found)["precision_without_region"] is None


def test_prompt_and_topic_fall_back(tmp_path):
    rows = [{"id": f"x{i}", "response": "a", "sentences": facts("S")} for i in range(3)]
    found = score(tmp_path, rows)
    assert (found["n_prompts"], found["n_topics"]) == (3, 3)
    assert found["metrics"]["cut_by_length"]["mean"] is None


def test_reasoning_is_not_speech(tmp_path):
    rows = [row("chad-all", 0, "", response="<think>long and hard</think> "),
            row("peru-all", 0, "S", response="<think>so</think> Peru is here.")]
    got = means(score(tmp_path, rows))
    assert got["responded"] == 1 / 2 and got["words"] == 3 / 2


def test_json_schema(tmp_path):
    rows = [row(f"{topic}-all", k, "S NS IR", "place border vague")
            for topic in ("chad", "peru") for k in (0, 1)]
    found = score(tmp_path, rows)
    assert set(found) >= {"n_prompts", "n_responses", "k", "metrics", "by_kind"}
    for group in (found["metrics"], *found["by_kind"].values()):
        for metric in group.values():
            assert set(metric) - {"reason"} == {"mean", "lo", "hi"}
            assert ("reason" in metric) == (metric["mean"] is None)
    assert {"f1_at_k", "precision", "factscore", "factscore_penalised", "supported", "unsupported",
            "facts", "words", "responded", "repeated", "unjudged", "irrelevant", "precision_pooled",
            "precision_without_region"} <= set(found["metrics"])


def test_table_and_closing_block(tmp_path):
    path = write_rows(tmp_path / "v.jsonl", [row("chad-all", 0, "S NS NS", "place place border")])
    done = call("06_eval.py", "score", "--in", path, "--k", 4)
    assert done.returncode == 0 and "| precision  " in done.stdout and "33.3 %" in done.stdout
    assert "'label'" in done.stdout
    assert done.stderr.startswith("---\n") and "unjudged:" in done.stderr


def bio(topic, *sentences):
    """A row in the released files' own form; without sentences an abstention."""
    annotated = [{"text": "Something.", "is-relevant": human is not None,
                  "model-atomic-facts": [{"text": "Something."}],
                  "human-atomic-facts": human and [{"text": "Same.", "label": label}
                                                   for label in human.split()]}
                 for human in sentences]
    return {"input": f"Question: Tell me a bio of {topic}.", "output": "Some bio.", "topic": topic,
            "cat": ["rare", "Asia"], "annotations": annotated or None}


def test_factscore_files_as_they_are(tmp_path):
    found = score(tmp_path, [bio("A B", "S S", "NS IR", None), bio("C D"), bio("E F", "NS NS")])
    got = means(found)
    assert found["label"] == "human" and found["n_topics"] == 3
    assert got["factscore"] == pytest.approx((2 / 4 + 0) / 2)    # over those that responded
    assert got["factscore_penalised"] == pytest.approx(2 / 4 * math.exp(1 - 10 / 4) / 2)
    assert got["precision"] == pytest.approx((2 / 3 + 0) / 2)
    assert got["responded"] == pytest.approx(2 / 3)
    assert got["facts"] == pytest.approx((4 + 2) / 2)
    assert got["f1_at_k"] == pytest.approx((4 / 7 + 0 + 0) / 3)  # (2/3, 1/2) -> 4/7; silence is 0


def test_median_claims_is_where_k_comes_from(tmp_path):
    rows = [row("chad-all", 0, "S NS IR"), row("chad-all", 1, "S NS NS"), row("peru-all", 0, "-")]
    assert score(tmp_path, rows[2:])["median_claims"] is None
    assert score(tmp_path, rows)["median_claims"] == 2.5  # of 2 and 3; the third is unjudged
    path = write_rows(tmp_path / "v.jsonl", rows)
    for flags in ((), ("--json",)):
        done = call("06_eval.py", "score", "--in", path, "--k", 1, *flags)
        assert done.returncode == 0 and "median_claims:    2.5\n" in done.stderr


def test_k_comes_from_the_protocol_or_the_flag(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "v.jsonl", [row("chad-all", 0, "S")])
    monkeypatch.setattr("sys.argv", ["06_eval.py", "score", "--in", str(path)])
    monkeypatch.setitem(ev.PROTOCOL, "k", 7)
    assert ev.parse_args().k == 7
    monkeypatch.setattr("sys.argv", ["06_eval.py", "score", "--in", str(path), "--k", "3"])
    assert ev.parse_args().k == 3


# Intervals

def simulated(rng, topics, prompts=3, spread=1.0, noise=1.0):
    """One data set: prompts of a topic share the topic's effect; the true mean is 0."""
    effect = rng.normal(0, spread, topics)
    num = {f"{t}-{p}": effect[t] + rng.normal(0, noise)
           for t in range(topics) for p in range(prompts)}
    return {prompt: prompt.split("-")[0] for prompt in num}, num


def test_coverage_of_the_interval():
    rng, inside, by_prompts = np.random.default_rng(1), 0, 0
    for i in range(300):
        topic_of, num = simulated(rng, topics=40)
        found = ev.estimate(topic_of, num, seed=i, resamples=400)
        inside += found["lo"] <= 0 <= found["hi"]
        wrong = ev.estimate({prompt: prompt for prompt in num}, num, seed=i, resamples=400)
        by_prompts += wrong["lo"] <= 0 <= wrong["hi"]
    assert .90 <= inside / 300 <= .98
    assert by_prompts / 300 < .88  # prompts drawn one by one would claim too much


def test_interval_equals_a_plain_loop():
    """Topics of unequal size: draw topics, pool all their prompts, average."""
    num = {"a1": 1.0, "a2": 3.0, "a3": 2.0, "b1": 8.0, "c1": 4.0, "c2": 0.0}
    topic_of = {prompt: prompt[0] for prompt in num}
    found = ev.estimate(topic_of, num)
    rng, drawn = np.random.default_rng(5), []
    for _ in range(4000):
        pool = [num[p] for t in rng.choice(list("abc"), 3) for p in num if p[0] == t]
        drawn.append(sum(pool) / len(pool))
    assert found["mean"] == pytest.approx(3.0)
    assert [found["lo"], found["hi"]] == pytest.approx(np.quantile(drawn, (.025, .975)), abs=.35)


def test_interval_edges():
    assert ev.estimate({}, {}) == {"mean": None, "lo": None, "hi": None}
    one = ev.estimate({"p": "t", "q": "t"}, {"p": 1, "q": 2})
    assert one == {"mean": 1.5, "lo": None, "hi": None}
    topics = {str(i): str(i) for i in range(30)}
    same = ev.estimate(topics, dict.fromkeys(topics, .5))
    assert same == {"mean": .5, "lo": .5, "hi": .5}
    rare = {p: float(p == "0") for p in topics}  # a third of the resamples would divide by zero
    found = ev.estimate(topics, dict.fromkeys(topics, 1), rare)
    assert found == {"mean": 30, "lo": None, "hi": None}
    assert ev.estimate(topics, {p: int(p) for p in topics}, seed=3) == ev.estimate(
        topics, {p: int(p) for p in topics}, seed=3)


# compare

def made(per_prompt, name="f1_at_k"):
    """Responses with one metric: {"topic-prompt": [values]}."""
    return [{"prompt": prompt, "topic": prompt.split("-")[0], "values": {name: value}}
            for prompt, values in per_prompt.items() for value in values]


def test_paired_by_hand():
    base = made({"a-1": [.2, .4], "a-2": [.1, .1], "b-1": [.6, None], "c-1": [None, None]})
    tuned = made({"b-1": [.5, .9], "a-1": [.6, .6], "c-1": [.3], "d-1": [.9]})
    found = ev.paired(tuned, base, "f1_at_k")  # both sides: a-1 (.3, .6) and b-1 (.6, .7)
    assert found["prompts"] == 2
    assert found["difference"]["mean"] == pytest.approx(.2)
    assert found["base"]["mean"] == pytest.approx(.45)
    assert found["tuned"]["mean"] == pytest.approx(.65)
    assert found["ratio"]["mean"] == pytest.approx(.65 / .45)
    assert found["headroom"]["mean"] == pytest.approx(.2 / (.5 - .45))  # best: .4 and .6
    ends = found["difference"]["lo"], found["difference"]["hi"]
    assert ends == pytest.approx((.1, .3))


def test_paired_difference_is_tighter_than_unpaired():
    rng = np.random.default_rng(2)
    level = rng.normal(0, 1, 50)
    base = made({f"{t}-1": [level[t]] for t in range(50)})
    tuned = made({f"{t}-1": [level[t] + .3 + rng.normal(0, .1)] for t in range(50)})
    found = ev.paired(tuned, base, "f1_at_k")["difference"]
    assert found["lo"] < .3 < found["hi"] and found["hi"] - found["lo"] < .1
    alone = ev.estimate({r["prompt"]: r["topic"] for r in base}, ev.by_prompt(base, "f1_at_k"))
    assert alone["hi"] - alone["lo"] > .3


def test_paired_coverage():
    rng, inside = np.random.default_rng(4), 0
    for i in range(200):
        topic_of, noise = simulated(rng, topics=30)
        base = made({p: [rng.normal(5, 2)] for p in noise})
        level = ev.by_prompt(base, "f1_at_k")
        tuned = made({prompt: [level[prompt] + .5 + noise[prompt]] for prompt in level})
        found = ev.paired(tuned, base, "f1_at_k", seed=i, resamples=400)["difference"]
        inside += found["lo"] <= .5 <= found["hi"]
    assert .90 <= inside / 200 <= .98


def test_best_of_takes_the_highest_f1():
    base = made({"a-1": [.2, .4, .4], "b-1": [None, 0.0], "c-1": [None]})
    best = ev.best_of(base)
    kept = {r["prompt"]: r["values"]["f1_at_k"] for r in best}
    assert kept == {"a-1": .4, "b-1": 0.0, "c-1": None}
    assert best[0] is base[1] and len(best) == 3  # the first of the equal ones


def compare(tmp_path, *flags, **sets):
    files = [f"{name.replace('_', '-')}={write_rows(tmp_path / f'{name}.jsonl', rows)}"
             for name, rows in sets.items()]
    done = call("06_eval.py", "compare", *files, "--k", 4, "--out-json", tmp_path / "c.json",
                "--out-md", tmp_path / "c.md", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.md").read_text(encoding="utf-8") == done.stdout
    return json.loads((tmp_path / "c.json").read_text()), done.stdout


def test_responses_that_are_missing_are_told(tmp_path):
    """Three of four failed: the mean over what is left is no fair one."""
    whole = [row(f"t{n}-a", k, "S NS") for n in range(4) for k in range(2)]
    _, text = compare(tmp_path, base=whole, tuned=whole)
    assert "What failed" not in text
    _, text = compare(tmp_path, base=whole, tuned=whole[:5])
    assert "\ntuned: 5 of 8 responses. What failed is no random part" in text
    assert "base: " not in text and "best-of-2: " not in text


TOPICS = [f"t{i}x" for i in range(12)]


def rows_of(*labels, kinds=None):
    return [row(f"{t}-all", k, said, kinds) for t in TOPICS for k, said in enumerate(labels)]


def test_compare_rows_and_verdict(tmp_path):
    base, cool = rows_of("S NS NS NS", "NS NS NS NS"), rows_of("S S NS NS", "S S NS NS")
    greedy, tuned = rows_of("S NS"), rows_of("S NS NS", "S NS NS")
    found, text = compare(tmp_path, tuned=tuned, base=base, base_greedy=greedy, base_cool=cool)
    assert list(found["rows"]) == ["base", "base-cool", "base-greedy", "base best-of-2", "tuned"]
    mean = {name: means(of) for name, of in found["rows"].items()}
    assert mean["base"]["precision"] == 1 / 8 and mean["base best-of-2"]["precision"] == 1 / 4
    verdict = {(v["column"], v["against"]): v for v in found["verdict"]}
    against_base = verdict["precision", "base"]
    assert against_base["difference"]["mean"] == pytest.approx(1 / 3 - 1 / 8)
    assert against_base["ratio"]["mean"] == pytest.approx(8 / 3)
    assert against_base["headroom"]["mean"] == pytest.approx((1 / 3 - 1 / 8) / (1 / 4 - 1 / 8))
    assert against_base["beats"] is True and against_base["is_better"] is False
    against_cool = verdict["precision", "base-cool"]  # cool and greedy both .5: the first
    assert against_cool["beats"] is False and against_cool["is_better"] is True
    assert against_cool["headroom"] is None
    assert verdict["f1_at_k", "base-cool"]["is_better"]  # (1/2, 1/2) against greedy's (1/2, 1/4)
    assert "| precision: tuned does not beat base-cool " in text and "sharpening" not in text
    assert "| precision: tuned against base " in text  # beaten, but it is not the better one


def test_compare_better_is_chosen_by_column(tmp_path):
    base, cool, greedy = rows_of("S NS NS NS"), rows_of("S S S NS NS NS NS"), rows_of("S")
    found, text = compare(tmp_path, base=base, base_cool=cool, base_greedy=greedy,
                          tuned=rows_of("S S S S"))
    better = {v["column"]: v["against"] for v in found["verdict"] if v["is_better"]}
    assert better == {"f1_at_k": "base-cool", "precision": "base-greedy"}  # F1@4 6/11 and 2/5
    assert "f1_at_k: tuned beats base-cool" in text
    assert "precision: tuned does not beat base-greedy" in text


def test_compare_without_borders_is_its_own_row(tmp_path):
    base = rows_of("NS NS NS S", kinds="border border place place")
    tuned = rows_of("S S NS S", kinds="border direction place place")  # all of the gain is borders
    found, text = compare(tmp_path, base=base, tuned=tuned)
    verdict = {v["column"]: v for v in found["verdict"]}
    assert verdict["precision"]["beats"] is True
    assert verdict["precision_without_border_direction"]["difference"]["mean"] == 0
    assert verdict["precision_without_border_direction"]["beats"] is False
    assert "precision_without_border_direction: tuned does not beat base" in text
    assert "sharpening is not ruled out" in text


def test_compare_marks_precision_bought_by_saying_less(tmp_path):
    _, text = compare(tmp_path, base=rows_of("S S NS NS"), tuned=rows_of("S"),
                      tuned_greedy=rows_of("S S S"))
    lines = [line.split("|")[1].strip() for line in text.splitlines() if "† |" in line]
    assert lines == ["tuned"]


def test_compare_of_base_alone_and_of_other_prompts(tmp_path):
    found, text = compare(tmp_path, base=rows_of("S NS"))
    assert found["verdict"] == [] and "base best-of-1" in text
    base = write_rows(tmp_path / "b.jsonl", rows_of("S NS"))
    other = write_rows(tmp_path / "o.jsonl", [row(f"u{i}-all", 0, "S") for i in range(3)])
    done = call("06_eval.py", "compare", f"base={base}", f"tuned={other}", "--k", 4)
    assert (done.returncode, done.stdout) == (2, "") and "found none of them" in done.stderr


def test_compare_of_one_topic_has_no_verdict_in_favour(tmp_path):
    found, text = compare(tmp_path, base=rows_of("NS NS")[:1], tuned=rows_of("S S")[:1])
    assert found["verdict"][0]["difference"] == {"mean": 2 / 3, "lo": None, "hi": None}
    assert found["verdict"][0]["beats"] is False and "f1_at_k: tuned does not beat base" in text


def test_compare_says_which_rows_humans_labelled(tmp_path):
    human = [row(f"{t}-all", 0, "", sentences=[{"facts": [{"text": "a", "human": "S"}]}])
             for t in TOPICS]
    _, text = compare(tmp_path, base=rows_of("S NS"), tuned=human)
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names[2:5] == ["base", "base best-of-1", "tuned by human"]


def test_compare_with_kinds_on_one_side(tmp_path):
    found, _ = compare(tmp_path, base=rows_of("S NS", kinds="place border"), tuned=rows_of("S NS"))
    prompts = {v["column"]: v["prompts"] for v in found["verdict"]}
    assert (prompts["precision"], prompts["precision_without_border_direction"]) == (12, 0)


def test_compare_of_many_methods(tmp_path):
    """Each NAME has its own verdict against the base; its -cool and -greedy are rows only."""
    base = rows_of("S NS NS NS", "NS NS NS NS")  # precision 1/4 and 0
    found, text = compare(tmp_path, rft_cool=rows_of("S"), rft=rows_of("NS NS"), base=base,
                          tuned_greedy=rows_of("S S"), apeft=rows_of("S NS", "S S NS NS"))
    assert list(found["rows"]) == ["base", "base best-of-2", "rft-cool", "rft", "tuned-greedy",
                                   "apeft"]
    verdict = {v["name"]: v for v in found["verdict"] if v["column"] == "precision"}
    assert {name: v["difference"]["mean"] for name, v in verdict.items()} == {
        "rft": 0 - 1 / 8, "apeft": 1 / 2 - 1 / 8}
    assert verdict["apeft"]["headroom"]["mean"] == (1 / 2 - 1 / 8) / (1 / 4 - 1 / 8)
    assert "| precision: apeft beats base " in text and "| f1_at_k: rft does not beat base " in text
    assert "-cool beats" not in text and "-cool does" not in text and " against base " not in text


def shown(text):
    """{prompt: [lines below it]} of what --show adds; blank ones left out."""
    parts = text.split("\n## ")[1:]
    return {part.split("\n")[0]: [line for line in part.splitlines()[1:] if line]
            for part in parts}


def test_show_by_hand(tmp_path):
    said = [{"text": "Chad is in Africa", "label": "S", "kind": "region", "evidence": [
                {"title": "Chad", "field": "Location", "text": "Central Africa, " + "far " * 40},
                {"title": "Chad", "field": "Background", "text": "never shown"}]},
            {"text": "It is an\nisland", "label": "NS", "kind": "place", "evidence": [
                {"title": "Chad", "field": "Coastline", "text": "0 km (landlocked)"}]},
            {"text": "It is a long story " * 9, "label": "S", "kind": "other", "evidence": [
                {"title": "Chad", "text": "a passage without a field"}]},
            {"text": "It has oil", "label": None}, {"text": "It has uranium", "label": "S"}]
    base = [row("chad-all", 0, "", sentences=[{"facts": said}], response="far\nword"),
            row("chad-all", 1, "S", response="the second is not shown")]
    tuned = [row("chad-all", 0, "", response=" "), row("peru-all", 0, "S")]
    _, text = compare(tmp_path, "--show", 5, base=base, tuned=tuned)  # in the markdown as well
    assert list(shown(text)) == ["chad-all"]
    first, located, place, story, *others, empty = shown(text)["chad-all"]
    assert (first, empty) == ("base: far word", "tuned: (empty)")
    assert located.startswith("    S   (region) Chad is in Africa <- Location: Central Africa, far")
    assert 95 < len(located) <= 100 and located.endswith(" far [...]")
    assert place == "    NS  (place) It is an island"
    assert story.startswith("    S   (other) It is a long story It is")
    assert story.endswith(" [...] <- passage: a passage [...]") and len(story) <= 100
    assert others == ["    -   (-) It has oil", "    S   (-) It has uranium"]


def test_show_spreads_over_the_prompts_that_all_have(tmp_path):
    topics = [f"t{i}x" for i in range(10)]
    base = [row(f"{t}-all", k, "S") for t in topics for k in (0, 1)]
    tuned = [row(f"{t}-all", 0, "S") for t in reversed(topics)]  # the base's order is kept
    rft = [row(f"{t}-all", 0, "S") for t in topics[1:]]
    for n, expected in ((0, []), (1, [1]), (3, [1, 4, 7]), (50, range(1, 10))):
        found, text = compare(tmp_path, "--show", n, base=base, tuned=tuned, rft=rft)
        assert list(shown(text)) == [f"t{i}x-all" for i in expected]
        assert "shown" not in found and text.count("\nrft: five words") == len(expected)
    _, text = compare(tmp_path, "--show", 3, base=base, a=tuned[:5], b=tuned[5:])
    assert shown(text) == {}  # no prompt that all three have
    _, text = compare(tmp_path, "--show", 1, base=base, tuned_cool=tuned)
    assert shown(text)["t0x-all"] == ["base: five words in a row", "    S   (-) claim number 0"]


def test_show_refuses_junk_as_evidence(tmp_path):
    path = tmp_path / "v.jsonl"
    for junk in ("x", 1, ["x"], {"a": 1}):
        fact = {"text": "a", "label": "S", "evidence": junk}
        write_rows(path, [row("chad-all", 0, "", sentences=[{"facts": [fact]}])])
        done = call("06_eval.py", "compare", f"base={path}", f"t={path}", "--k", 4, "--show", 1)
        assert done.returncode == 2 and f"{path}:1: expected" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


# agreement

def pairs(text):
    return [dict(zip(("label", "human"), text.split()))]


def test_agree_by_hand():
    """20 S-S, 5 S-NS, 10 NS-S, 15 NS-NS: the textbook table with kappa .40."""
    got = ev.agree(pairs("S S") * 20 + pairs("S NS") * 5 + pairs("NS S") * 10 + pairs("IR NS") * 15
                   + [{"label": None, "human": "S"}] * 4)
    assert (got["tp"], got["fp"], got["fn"], got["tn"]) == (20, 5, 10, 15)
    assert (got["facts"], got["null"]) == (50, 4)
    assert got["kappa"] == pytest.approx(.4) and got["accuracy"] == pytest.approx(.7)
    assert got["always_ns"] == pytest.approx(20 / 50)
    assert got["recall"] == pytest.approx(2 / 3) and got["precision"] == pytest.approx(.8)
    assert got["balanced"] == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_agree_of_one_class():
    got = ev.agree(pairs("NS NS") + pairs("NS IR"))
    assert got["accuracy"] == 1 and got["kappa"] is got["recall"] is got["balanced"] is None
    assert ev.agree([{"label": None, "human": "S"}])["accuracy"] is None


def test_agreement_by_field(tmp_path):
    def fact(label, human, kind, **more):
        return {"text": "a", "label": label, "human": human, "kind": kind, **more}

    base = [fact("S", "S", "border"), fact("NS", "S", "place"), {"text": "a", "label": "S"}]
    tuned = [fact("NS", "NS", "border"), fact(None, "S", "border"),
             fact("S", "NS", "place", half="hard")]  # a fact's own field wins over its row's
    rows = [{"id": half, "response": "a", "half": half, "sentences": [{"facts": made}]}
            for half, made in (("base", base), ("tuned", tuned))]
    path = write_rows(tmp_path / "v.jsonl", rows)
    done = call("06_eval.py", "agreement", "--in", path, "--by", "half,kind", "--json")
    found = json.loads(done.stdout)
    counts = {name: [group[part] for part in ("tp", "fp", "fn", "tn", "null")]
              for name, group in found.items()}
    assert counts == {"all": [1, 1, 1, 1, 1], "half base": [1, 0, 1, 0, 0],
                      "half tuned": [0, 0, 0, 1, 1], "half hard": [0, 1, 0, 0, 0],
                      "kind border": [1, 0, 0, 1, 1], "kind place": [0, 1, 1, 0, 0]}
    done = call("06_eval.py", "agreement", "--in", path, "--by", "half")
    assert "| half tuned |" in done.stdout and "kappa" in done.stdout


# plot

def log_row(step, **rewards):
    return {"step": step, "epoch": .1, "learning_rate": 1e-5, "grad_norm": 20.1,
            "loss": .7 - step / 100 + step % 3 / 10,
            **{f"rewards/{name}": value for name, value in rewards.items()}}


def dpo_log(n=30):
    """A held-out row before and one after n training rows."""
    held = [{"step": step, "eval_loss": .69 - step / 1000, "eval_rewards/chosen": step / 50,
             "eval_rewards/rejected": -step / 50, "eval_rewards/margins": step / 25,
             "eval_rewards/accuracies": .5} for step in (0, n)]
    rows = [log_row(i, chosen=i / 40, rejected=-i / 20, margins=3 * i / 40, accuracies=i / n)
            for i in range(n)]
    return [held[0], *rows, held[1]]


def drawn(axes):
    """[(line style, marker, steps, values)] of what a panel shows, in order."""
    return [(line.get_linestyle(), line.get_marker(), *map(list, line.get_data()))
            for line in axes.lines]


def test_curves_of_one_run():
    rows = dpo_log()
    figure = pictures.curves({"a": rows})
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)
    loss = np.array([row["loss"] for row in rows[1:-1]])
    mean, held, ln2 = drawn(figure.axes[0])
    assert mean[:3] == ("-", "o", list(range(30)))
    full = np.convolve(loss, np.ones(10) / 10, "valid")  # from step 9 on, ten values each
    start = loss[:9].cumsum() / np.arange(1, 10)
    assert mean[3] == pytest.approx([*start, *full])
    assert held == ("None", "o", [0, 30], pytest.approx([.69, .66]))
    assert ln2[0] == ":" and ln2[3] == pytest.approx([.693147, .693147], abs=1e-6)
    assert len({line.get_color() for line in figure.axes[0].lines[:2]}) == 1
    rejected, held = drawn(figure.axes[2])
    assert rejected[3][:2] == pytest.approx([0, -1 / 40]) and held[3] == pytest.approx([0, -.6])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "ln 2"]


def test_curves_show_only_what_some_log_has():
    sft = [{**log_row(i), "tokens": 900} for i in range(4)]
    alone = pictures.curves({"sft": sft})
    assert len(alone.axes) == 1 and len(alone.axes[0].lines) == 2  # no rewards, no ln 2
    both = pictures.curves({"sft": sft, "dpo": dpo_log()[:1]})  # its training has just begun
    assert len(both.axes) == 5
    assert [text.get_text() for text in both.legends[0].get_texts()] == ["sft", "dpo", "ln 2"]
    colours = [line.get_color() for line in both.axes[0].lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert len(set(pictures.COLOURS)) == len(pictures.COLOURS) == 7
    some = pictures.curves({"m": [log_row(0, margins=1)]})
    assert [axes.get_ylabel() for axes in some.axes] == ["loss", "rewards/margins"]


def test_plot_writes_pictures(tmp_path):
    from xml.etree import ElementTree

    from matplotlib.image import imread
    path = write_rows(tmp_path / "log.jsonl", dpo_log())
    out = tmp_path / "new" / "curves.png"
    env = {**os.environ, "MPLBACKEND": "tkagg"}  # needs a display
    done = call("06_eval.py", "plot", f"a={path}", f"b={path}", "--out", out, env=env)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG\r\n") and imread(out).std() > 0
    height, width, _ = imread(out).shape
    assert width > 3 * height / 2 > 600
    out = tmp_path / "curves.svg"
    assert call("06_eval.py", "plot", f"a={path}", f"b={path}", "--out", out).returncode == 0
    assert ElementTree.parse(out).getroot().tag.endswith("svg")
    assert "<!-- a -->" in out.read_text() and "<!-- b -->" in out.read_text()


@pytest.mark.parametrize("bad", [
    '{"step": 1, "lo', "[1]", "3", "null", '{"loss": 1}', '{"step": 1, "loss": "x"}', "NaN",
    '{"step": null, "loss": 1}', '{"step": 1, "loss": [1]}', "[" * 100_000, "1" * 5_000,
    '{"step": 1}', '{"step": 1, "loss": 1, "rewards/margins": "x"}', "\ud800",
    '{"step": 1, "loss": NaN}', '{"step": 1, "loss": 1' + "0" * 400 + "}"])
def test_plot_refuses_a_bad_line(tmp_path, bad):
    path, out = tmp_path / "log.jsonl", tmp_path / "c.png"
    path.write_bytes(f'{json.dumps(log_row(0))}\n{bad}\n'.encode(errors="surrogatepass"))
    out.write_text("a picture of before")
    done = call("06_eval.py", "plot", f"a={path}", "--out", out)
    assert done.returncode == 2 and done.stderr.startswith(f"{path}:2: expected "), done.stderr
    assert ", found " in done.stderr and len(done.stderr.splitlines()) == 1
    assert out.read_text() == "a picture of before"


def test_plot_refuses_bad_flags_and_files(tmp_path):
    path, empty = write_rows(tmp_path / "log.jsonl", dpo_log()), tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for words, says in [
            ([f"a={tmp_path / 'none.jsonl'}", "--out", "c.png"], "no such file"),
            ([f"a={empty}", "--out", "c.png"], "found an empty file"),
            ([path, "--out", "c.png"], "NAME=FILE"),
            ([f"a={path}", f"a={path}", "--out", "c.png"], "each NAME once"),
            ([f"a={path}", "--out", tmp_path / "c.jpg"], ".png or .svg")]:
        done = call("06_eval.py", "plot", *words)
        assert done.returncode == 2 and says in done.stderr, (words, done.stderr)
        assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


# Bad input

@pytest.mark.parametrize("bad, says", [
    ({"sentences": "x"}, ":3: expected 'sentences'"),
    ({"sentences": None}, ":3: expected 'sentences'"),
    ({"sentences": [1]}, ":3: expected 'sentences'"),
    ({"sentences": [{"facts": None}]}, ":3: expected 'sentences'"),
    ({"sentences": [{}]}, "KeyError 'facts'"),
    ({"sentences": [{"facts": ["x"]}]}, ":3: expected 'sentences'"),
    ({"sentences": [{"facts": [{"label": "S"}]}]}, "KeyError 'text'"),
    ({"sentences": [{"facts": [{"text": 1, "label": "S"}]}]}, "not {'text': 1"),
    ({"sentences": [{"facts": [{"text": "a", "label": "true"}]}]}, "label S, NS, IR or null"),
    ({"sentences": [{"facts": [{"text": "a", "label": ["S"]}]}]}, "label S, NS, IR or null"),
    ({"sentences": [{"facts": [{"text": "a", "label": "S", "kind": 3}]}]}, "'kind': 3"),
    ({"sentences": [{"facts": [{"text": "a"}]}]}, "expected 'label' in every fact"),
    ({"response": 3}, ":3: expected 'response' as str")])
def test_bad_rows(tmp_path, bad, says):
    good = row("chad-all", 0, "S")
    path = tmp_path / "v.jsonl"  # the bad one is on line 3, after a blank line
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps({**row('chad-all', 1, 'S'), **bad})}\n")
    for command in (["score", "--in", path, "--k", 4], ["compare", f"base={path}", "--k", 4]):
        done = call("06_eval.py", *command)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_bad_flags_and_files(tmp_path):
    path = write_rows(tmp_path / "v.jsonl", [row("chad-all", 0, "S")])
    samples = write_rows(tmp_path / "samples.jsonl", [{"id": "1", "response": "a"}])
    for command, says in [
            (["score", "--in", tmp_path / "none.jsonl", "--k", 4], "no such file"),
            (["score", "--in", samples, "--k", 4], "03_verify.py"),
            (["score", "--in", path, "--k", 0], "--k of at least 1, found 0"),
            (["score", "--in", path, "--seed", -1], "--seed of at least 0, found -1"),
            (["compare", f"base={path}", "--show", -1], "--show of at least 0, found -1"),
            (["compare", path, "--k", 4], "NAME=FILE"),
            (["compare", f"tuned={path}", "--k", 4], "base"),
            (["compare", f"base={path}", f"base={path}", "--k", 4], "once"),
            (["compare", f"base={path}", f"base-cold={path}", "--k", 4], "base-greedy"),
            (["compare", f"base={path}", f"={path}", "--k", 4], "NAME=FILE"),
            (["compare", f"base={path}", "rft=", "--k", 4], "NAME=FILE"),
            (["agreement", "--in", path], "'human'"),
            (["nonsense"], "invalid choice")]:
        done = call("06_eval.py", *command)
        assert done.returncode == 2 and says in done.stderr, (command, done.stderr)
        assert "Traceback" not in done.stderr and done.stdout == ""


def test_agreement_by_an_unknown_field(tmp_path):
    both = [{"facts": [{"text": "a", "label": "S", "human": "S"}]}]
    path = write_rows(tmp_path / "v.jsonl", [{"id": "1", "response": "a", "sentences": both}])
    done = call("06_eval.py", "agreement", "--in", path, "--by", "colour")
    assert done.returncode == 2 and "'colour'" in done.stderr


JUNK = (None, 1, 2.5, True, "", "x", [], {}, [1], {"a": 1}, [[]], "\ud800", float("nan"))


def places(node, found):
    """Every (container, key) below a JSON value."""
    if isinstance(node, (dict, list)):
        for key in (list(node) if isinstance(node, dict) else range(len(node))):
            found.append((node, key))
            places(node[key], found)
    return found


def test_junk_is_scored_or_refused_in_one_line(tmp_path, monkeypatch, capsys):
    """120 rows with one value replaced: exit 0 or 2, never another exception."""
    rng, refused = random.Random(0), 0
    for _ in range(120):
        node = rng.choice([row("chad-all", 0, "S -", "border vague"), bio("A B", "S NS", None)])
        holder, key = rng.choice([place for place in places(node, []) if place[1] != "id"])
        holder[key] = rng.choice(JUNK)
        path = tmp_path / "v.jsonl"
        path.write_text(json.dumps(node) + "\n")
        monkeypatch.setattr("sys.argv", ["06_eval.py", *rng.choice([
            ["score", "--in", str(path), "--k", "4"],
            ["agreement", "--in", str(path), "--by", "kind"],
            ["compare", f"base={path}", f"tuned={path}", "--k", "4"]])])
        try:
            assert ev.main() == 0
        except SystemExit as stop:
            refused += 1
            assert stop.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
        capsys.readouterr()
    assert 0 < refused < 120
