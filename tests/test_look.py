"""06 calibration, shift and the pictures: against plain loops, planted models, what is drawn."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import call, read_rows, stage, write_rows

from data import pictures

ev = stage("06_eval")
rng = np.random.default_rng(0)


# calibration

def plain_auc(facts):
    pairs = [(a, b) for _, a, good in facts if good for _, b, bad in facts if not bad]
    return np.mean([1 if a > b else .5 if a == b else 0 for a, b in pairs])


def some_facts(n=120, topics=8, lean=.3):
    true = rng.random(n) < .4
    conf = np.round(np.clip(rng.random(n) * .7 + lean * true, 0, 1), 1)  # tenths: many ties
    return [(f"t{i % topics}", float(c), bool(t)) for i, (c, t) in enumerate(zip(conf, true))]


def test_auc_is_the_share_of_pairs_in_order():
    facts = some_facts()
    assert ev.calibrate(facts)["auc"]["mean"] == pytest.approx(plain_auc(facts))
    upside_down = [(topic, 1 - conf, true) for topic, conf, true in facts]
    assert ev.calibrate(upside_down)["auc"]["mean"] == pytest.approx(1 - plain_auc(facts))


@pytest.mark.parametrize("facts, area", [
    ([("a", .9, True), ("b", .1, False)], 1), ([("a", .1, True), ("b", .9, False)], 0),
    ([("a", .5, True), ("b", .5, False)], .5), ([("a", .9, True), ("b", .1, True)], None)])
def test_auc_edges(facts, area):
    assert ev.calibrate(facts)["auc"] == {"mean": area, "lo": None, "hi": None}


def test_auc_interval_draws_whole_topics():
    facts = some_facts()
    names = sorted({topic for topic, *_ in facts})
    picks = np.random.default_rng(3).integers(len(names), size=(200, len(names)))
    draws = [plain_auc([f for i in pick for f in facts if f[0] == names[i]]) for pick in picks]
    found = ev.calibrate(facts, seed=3, resamples=200)["auc"]
    assert [found["lo"], found["hi"]] == pytest.approx(list(np.quantile(draws, (.025, .975))))


def test_bins_are_tenths_of_confidence():
    bins = ev.calibrate([("a", 0.0, False), ("a", .05, True), ("b", .3, True), ("b", .39, False),
                         ("c", 1, True)])["bins"]
    assert [(b["from"], b["facts"], b["confidence"], b["precision"]["mean"]) for b in bins] == [
        (0, 2, .025, .5), (.3, 2, pytest.approx(.345), .5), (.9, 1, 1, 1)]


def judged(topic, facts):
    made = [{"text": f"{topic} {i}", "label": label, "conf": conf and {
        "max": conf, "exp": conf / 2, "neg_ent": float(np.log(conf))}}
        for i, (label, conf) in enumerate(facts)]
    return {"id": topic, "topic": topic, "response": "r", "sentences": [{"facts": made}]}


def test_calibration_command(tmp_path):
    path = write_rows(tmp_path / "v.jsonl", [
        judged("a", [("S", .9), ("NS", .2), (None, .9), ("NS", None)]),
        judged("b", [("S", .4), ("NS", .5), ("IR", .9)])])
    out = tmp_path / "c.svg"
    done = call("06_eval.py", "calibration", "--in", path, "--json", "--out", out)
    assert done.returncode == 0 and "<svg" in out.read_text(), done.stderr
    found = json.loads(done.stdout)
    assert [of["auc"]["mean"] for of in found.values()] == [.75, .75, .75]
    bins = found["exp(neg_ent)"]["bins"]
    assert [b["confidence"] for b in bins] == pytest.approx([.2, .4, .5, .9])
    assert "left_out:         3" in done.stderr
    text = call("06_eval.py", "calibration", "--in", path).stdout
    assert "| max          | 0.75 " in text and "4 facts" in text


@pytest.mark.parametrize("conf", [None, 3, {"max": .5}, {"max": "x", "exp": 1, "neg_ent": 0},
                                  {"max": 7, "exp": 1, "neg_ent": 0}])
def test_calibration_wants_confidence(tmp_path, conf):
    row = judged("a", [("S", .9)])
    row["sentences"][0]["facts"][0]["conf"] = conf
    done = call("06_eval.py", "calibration", "--in", write_rows(tmp_path / "v.jsonl", [row]))
    assert done.returncode == 2 and "'conf'" in done.stderr and len(done.stderr.splitlines()) == 1


# shift

@pytest.fixture(scope="module")
def greedy(tiny_model, tmp_path_factory):
    """Greedy responses of the tiny model to two prompts, one cut by length."""
    folder = tmp_path_factory.mktemp("greedy")
    prompts = write_rows(folder / "p.jsonl", [
        {"id": f"p{i}", "topic": f"t{i}", "prompt": text} for i, text in enumerate(("Hi", "Oh?"))])
    done = call("01_generate.py", "--prompts", prompts, "--model", tiny_model, "--out",
                folder / "g.jsonl", "--temperature", 0, "--n", 1, "--max-new-tokens", 20)
    assert done.returncode == 0, done.stderr
    return folder / "g.jsonl"


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    """The tiny model with noise on its weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += .3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def shift(*words):
    done = call("06_eval.py", "shift", "--json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_is_not_shifted_against_itself(greedy, tiny_model, tmp_path):
    import shutil
    twin = shutil.copytree(tiny_model, tmp_path / "twin")  # loaded apart, not recognised by name
    for base in (tiny_model, twin):
        found = shift(f"in={greedy}", "--model", tiny_model, "--base", base)["in"]
        assert (found["unshifted"]["mean"], found["shifted"]["mean"]) == (1, 0)
        assert all(bucket["unshifted"] == 1 for bucket in found["by_position"])


def test_ranks_by_a_slow_loop(greedy, tiny_model, other_model):
    """Token by token, each from a prefix of its own, the rank found by sorting."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
              for name in (tiny_model, other_model)]
    several = set()
    for row in read_rows(greedy):
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        said = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        said += [2] * (row["finish"] == "stop")
        expected = []
        for at in range(len(said)):
            with torch.no_grad():
                mine, base = (m(torch.tensor([ids + said[:at]])).logits[0, -1] for m in models)
            order = base.sort(descending=True).indices.tolist()
            expected.append(1 + order.index(int(mine.argmax())))
        found, own = ev.ranks(models, tokenizer, row, "cpu")
        assert found == expected and len(own) == len(said)
        several |= set(found)
    assert len(several) > 3 and max(several) > 3


class Planted:
    """A model that ranks, at each position after `start`, the token at the planted rank first."""
    def __init__(self, tokens, start, rank=()):
        self.tokens, self.start, self.rank = tokens, start, rank

    def __call__(self, ids):
        import torch
        logits = torch.zeros(1, ids.shape[1], 300)
        for i, token in enumerate(self.tokens):
            others = [t for t in range(300) if t != token]
            for place in range((self.rank[i] if self.rank else 1) - 1):
                logits[0, self.start - 1 + i, others[place]] = 9
            logits[0, self.start - 1 + i, token] = 5
        return SimpleNamespace(logits=logits)


def test_planted_models_give_the_planted_shares(tiny_model):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    row = {"id": "a/0", "prompt_id": "a", "topic": "a", "prompt": "x", "response": "123456789",
           "finish": "stop"}
    start = len(tokenizer("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    tokens = tokenizer("123456789")["input_ids"] + [tokenizer.eos_token_id]
    planted = [1, 1, 2, 3, 4, 1, 1, 1, 9, 50]
    models = Planted(tokens, start), Planted(tokens, start, planted)
    found, own = ev.ranks(models, tokenizer, row, "cpu")
    assert found == planted and all(own)
    shares = ev.shift_of([row], [found])
    assert [shares[name]["mean"] for name in ev.SHIFT] == [.5, .2, .3]
    assert [(b["from"], b["to"], b["tokens"], b["marginal"], b["shifted"])
            for b in shares["by_position"]] == [
        (1, 1, 1, 0, 0), (2, 3, 2, .5, 0), (4, 7, 4, .25, .25), (8, 15, 3, 0, pytest.approx(2 / 3))]


def test_shares_are_means_over_prompts_and_positions_pool_tokens():
    rows = [{"prompt_id": name, "topic": name} for name in "aab"]
    found = ev.shift_of(rows, [[1], [9, 9], [1, 1, 1, 9]])
    assert found["shifted"]["mean"] == pytest.approx(((0 + 1) / 2 + 1 / 4) / 2)
    assert [b["shifted"] for b in found["by_position"]] == pytest.approx([1 / 3, 1 / 3, 1])


def test_shift_command_of_two_domains(greedy, tiny_model, other_model, tmp_path):
    out = tmp_path / "s.png"
    words = [f"in={greedy}", f"ood={greedy}", "--model", tiny_model, "--base", other_model]
    found = shift(*words, "--out", out)
    assert found["in"] == found["ood"] and found["in"]["unshifted"]["mean"] < 1
    assert out.read_bytes().startswith(b"\x89PNG")
    text = call("06_eval.py", "shift", *words).stdout
    assert "| ood |" in text.replace("  ", "") and "2 to 3" in text


@pytest.mark.parametrize("change, says", [
    ({"gen": {"temperature": .8}}, ":1: expected a greedy response"),
    ({"gen": None}, ":1: expected a greedy response"), ({"finish": None}, ":1: expected 'finish'"),
    ({"response": "quite another text, which it did not say"}, "of their tokens are its first")])
def test_shift_wants_greedy_rows_of_that_model(greedy, tiny_model, tmp_path, change, says):
    path = write_rows(tmp_path / "g.jsonl", [{**row, **change} for row in read_rows(greedy)])
    done = call("06_eval.py", "shift", f"in={path}", "--model", tiny_model, "--base", tiny_model)
    assert done.returncode == 2 and says in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


# Pictures

def point(precision, recall):
    return {"precision": dict(zip(("mean", "lo", "hi"), precision)),
            "recall_at_k": dict(zip(("mean", "lo", "hi"), recall))}


def test_plane():
    figure = pictures.plane({
        "base": point((.2, .1, .3), (.3, .2, .5)), "none": point((None,) * 3, (0, 0, 0)),
        "base-greedy": point((.3, None, None), (.4, .3, .5)),
        "base best-of-4": point((.4, .3, .5), (.4, .3, .5)),
        "round1": point((.5, .4, .6), (.5, .4, .6)),
        "round2": point((.6, .5, .7), (.4, .3, .5))}, 5)
    axes, = figure.axes
    assert axes.get_xlabel() == "recall at 5, %" and axes.get_ylabel() == "precision, %"
    marks = {bars.get_label(): bars.lines for bars in axes.containers}
    places = {name: [float(x[0]) for x in lines[0].get_data()] for name, lines in marks.items()}
    assert places == {"base": [30, 20], "base-greedy": [40, 30], "base best-of-4": [40, 40],
                      "round1": [50, 50], "round2": [40, 60]}
    assert [marks[name][0].get_marker() for name in places] == ["o", "^", "*", "o", "o"]
    colours = [marks[name][0].get_color() for name in places]
    assert colours[0] == colours[1] == colours[2] != colours[3] == colours[4]
    across, up = (bars.get_segments()[0].round(6).tolist() for bars in marks["base"][2])
    assert (across, up) == ([[20, 20], [50, 20]], [[30, 10], [30, 30]])
    joined = [list(line.get_xdata()) for line in axes.lines if line.get_color() == colours[3]]
    assert [50, 40] in joined
    for line in (line for line in axes.lines if line.get_linestyle() == ":"):
        r, p = map(np.array, line.get_data())
        f1 = 2 * p * r / (p + r)
        assert f1 == pytest.approx(np.full(len(r), round(f1[0]))) and round(f1[0]) % 5 == 0


def test_before_and_after():
    figure = pictures.before_after({"a": [(.2, .1), (.5, .5), (0, .4), (.1, .2)]}, 5)
    axes, = figure.axes
    assert axes.get_title() == "a: 2 better, 1 equal, 1 worse"
    assert {line.get_label(): [list(values) for values in line.get_data()]
            for line in axes.lines} == {
        "worse": [[0], [10]], "equal": [[1], [50]], "better": [[2, 3], [20, 40]]}
    ends = [segment[:, 1].tolist() for lines in axes.collections
            for segment in lines.get_segments()]
    assert ends == [[10, 20], [0, 40], [50, 50], [20, 10]]


def test_facts_of_a_response():
    figure = pictures.facts_per_response({"a": [(0, 2), (2, 2), (2, 0), (1, 1)], "b": [(0, 0)]})
    supported, unsupported = ([list(line.get_ydata()) for line in axes.lines]
                              for axes in figure.axes)
    assert supported == [[25, 25, 50], [100]] and unsupported == [[25, 25, 50], [100]]


def test_shift_and_reliability_pictures():
    buckets = [{"from": 1, "to": 1, "marginal": .1, "shifted": .2},
               {"from": 2, "to": 3, "marginal": .3, "shifted": 0}]
    figure = pictures.shift_by_position({"in-domain": buckets, "ood": buckets[:1]})
    shifted, marginal = ([list(line.get_ydata()) for line in axes.lines] for axes in figure.axes)
    assert shifted == [[20, 0], [20]] and marginal == [[10, 30], [10]]
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, pytest.approx(6 ** .5)]
    bins = ev.calibrate(some_facts())["bins"]
    figure = pictures.reliability({"max": bins})
    line = figure.axes[0].lines[1]
    assert list(line.get_xdata()) == [b["confidence"] for b in bins]
    assert list(line.get_ydata()) == [100 * b["precision"]["mean"] for b in bins]


def test_fifteen_names_are_told_apart():
    found = pictures.styles(map(str, range(15)))
    assert len({tuple(style.values()) for style in found.values()}) == 15
    first = list(found.values())[:7]
    assert len({style["color"] for style in first}) == len({s["marker"] for s in first}) == 7


@pytest.mark.parametrize("flag, path", [("--report", "."), ("--pictures", "b.jsonl"),
                                        ("--out-md", "b.jsonl/x.md")])
def test_an_impossible_output_is_one_line(tmp_path, flag, path):
    fact = {"text": "a", "label": "S"}
    rows = [{"id": "a", "topic": "a", "response": "r", "sentences": [{"facts": [fact]}]}]
    base = write_rows(tmp_path / "b.jsonl", rows)
    done = call("06_eval.py", "compare", f"base={base}", flag, tmp_path / path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert str(tmp_path) in done.stderr and read_rows(base) == rows


def test_compare_draws(tmp_path):
    def verified(prompt, labels):
        facts = [{"text": f"claim {i}", "label": label} for i, label in enumerate(labels.split())]
        return {"id": f"{prompt}/0", "prompt_id": prompt, "topic": prompt, "response": "a b",
                "sentences": [{"facts": facts}]}
    base = write_rows(tmp_path / "b.jsonl", [verified(p, "S NS") for p in "xyz"])
    tuned = write_rows(tmp_path / "t.jsonl", [verified(p, "S S") for p in "xyz"])
    for files in ([f"base={base}", f"tuned={tuned}"], [f"base={base}"]):
        folder = tmp_path / f"pictures{len(files)}"
        done = call("06_eval.py", "compare", *files, "--pictures", folder)
        assert done.returncode == 0, done.stderr
        names = {path.name for path in folder.iterdir()}
        assert names == {"plane.png", "facts.png"} | ({"prompts.png"} if len(files) > 1 else set())
        assert all(path.stat().st_size > 5000 for path in folder.iterdir())


def test_a_side_without_verdicts_is_drawn(tmp_path):
    null = {"id": "a", "topic": "a", "response": "r", "sentences": [
        {"facts": [{"text": "a", "label": None}]}]}
    files = [write_rows(tmp_path / "n.jsonl", [null]), write_rows(tmp_path / "s.jsonl", [
        {**null, "sentences": [{"facts": [{"text": "a", "label": "S"}]}]}])]
    for base, tuned in (files, files[::-1]):
        done = call("06_eval.py", "compare", f"base={base}", f"tuned={tuned}", "--pictures",
                    tmp_path / "pictures", "--report", tmp_path / "r.html")
        assert done.returncode == 0, done.stderr


def test_shift_of_nothing_is_refused(tmp_path, tiny_model):
    path = write_rows(tmp_path / "g.jsonl", [{"id": "a", "prompt": "x", "response": "",
                                              "finish": "length", "gen": {"temperature": 0}}])
    done = call("06_eval.py", "shift", f"a={path}", "--model", tiny_model, "--base", tiny_model)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
