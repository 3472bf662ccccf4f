"""05_train.py: one step of every loss against a plain loop written apart, KTO's mismatched pairs,
sentences, where policy and reference start, and two processes (gloo on a CPU) against one.
"""
import copy
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

import accelerate.utils
import psutil
import pytest
import torch
from conftest import ROOT, read_rows, stage, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

train = stage("05_train")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is so small that threads only cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------
# Rows: a response is written as pieces (text, label of the sentence or None). All of a piece's
# bytes are tokens of its sentence: a space before it belongs to it.

def asked(name, n=0, kind="fact", **more):
    return {"id": f"{name}/{n}", "prompt_id": name, "kind": kind,
            "prompt": [{"role": "user", "content": f"Is {name} a country?"}], **more}


def said(text):
    return [{"role": "assistant", "content": text}]


def pair(name, chosen, rejected, n=0, kind="fact", finish=("stop", "stop")):
    return asked(name, n, kind, chosen=said(chosen), rejected=said(rejected),
                 finish=dict(zip(("chosen", "rejected"), finish)))


def claim(name, pieces, label, n=0, kind="fact", finish="stop", searched=False, lost=()):
    """A row of sft, kto and factalign. lost: sentences (and labels) that are not in the text;
    searched: in FactAlign's released form, without spans."""
    row = asked(name, n, kind, completion=said("".join(text for text, _ in pieces)), label=label,
                finish=finish)
    found, end = [], 0
    for text, mark in pieces:
        end += len(text)
        if mark is not None:
            found.append((text.strip(), mark, [end - len(text.lstrip()), end]))
    found += [(text, mark, [0, 0]) for text, mark in lost]
    if found:
        row["completion_sentences"], row["sentence_label"], spans = map(list, zip(*found))
        row |= {} if searched else {"sentence_spans": spans}
    return row


PAIRS = [*(pair("a", "yes, it is", "no" * n, n) for n in (1, 2, 3)),  # share the chosen one
         pair("b", "y", "nope, it is not", 0, "atomic", ("length", "stop")),
         pair("c", "Yes, Peru.", "n", 0, "atomic"),
         pair("d", "It is a country in the South.", "It is.", 0, "if", ("stop", "length"))]
# Two rows of one prompt follow each other, so that a shift of 1 will not do; and b/1 is paired with
# d/0's completion, its own: a row of z0 that is also trained on.
PIECES = {
    "a/0": [("It is \u00e9 big.", True), (" It is in Asia.", False), (" So.", None)],
    "a/1": [("No.", False), ("  It is far.", True)],  # of two spaces one is nobody's
    "b/0": [("Hm,", None), (" it has no coast.", True)],
    "b/1": [("It is small", False)],
    "c/0": [("A b.", True), (" A b.", False), (" C d.", True)],  # searched: the same twice
    "d/0": [("It is small", True)],
    "e/0": [("Well.", None)]}
CLAIMS = [claim("a", PIECES["a/0"], True), claim("a", PIECES["a/1"], False, 1, "atomic"),
          claim("b", PIECES["b/0"], True, lost=[("Gone.", False)]),
          claim("b", PIECES["b/1"], False, 1, "atomic", "length"),
          claim("c", PIECES["c/0"], False, searched=True, lost=[("Gone.", False)]),
          claim("d", PIECES["d/0"], True, 0, "if", "length"),
          claim("e", PIECES["e/0"], True, searched=True, lost=[("Gone.", False)])]


# ---------------------------------------------------------------------------------------------
# The plain loop: one response at a time, the formulas of ALGORITHMS.md spelled out

def flags(*words, model="unused"):
    argv = ["05", "--prefs", "unused", "--out", "unused", "--model", model, *words]
    with mock.patch.object(sys, "argv", list(map(str, argv))):
        return train.parse_args()


def tokens_of(tokenizer, row, side):
    """(prompt, completion) in the tiny model's chat template."""
    text = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(row[side][0]["content"])["input_ids"]
    end = row["finish"][side] if isinstance(row["finish"], dict) else row["finish"]
    return tokenizer(text)["input_ids"], ids + [tokenizer.eos_token_id] * (end == "stop")


def token_logps(model, prompt, completion):
    """(tokens,), the whole sequence through the whole model."""
    logps = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return torch.stack([logps[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])


def sums_of_sentences(row, logps):
    """[(label, sum)] of the sentences with a token; every token is a byte here."""
    found, end = [], 0
    for text, mark in PIECES[row["id"]]:
        start, end = end, end + len(text.encode())
        start += max(0, len(text) - len(text.lstrip()) - 1)  # one space stays with its sentence
        if mark is not None:
            found.append((mark, logps[start:end].sum()))
    return found


def shifted(rows):
    """Of each row the number of the one whose completion it is paired with."""
    n, prompts = len(rows), [row["prompt"][0]["content"] for row in rows]
    for shift in range(1, n):
        if not any(prompts[i] == prompts[(i + shift) % n] for i in range(n)):
            return [(i + shift) % n for i in range(n)]


def mean(values):
    return sum(values) / len(values)


def rewards(prefix, marked, beta):
    """KTO's log row of [(label, log-ratio)]."""
    sides = {side: [beta * ratio.item() for mark, ratio in marked if mark == want]
             for side, want in (("chosen", True), ("rejected", False))}
    found = {f"{prefix}rewards/{side}": mean(some) for side, some in sides.items() if some}
    if all(sides.values()):
        found[f"{prefix}rewards/margins"] = mean(sides["chosen"]) - mean(sides["rejected"])
    return found


def reference_point(ratios, through):
    """z0; through: let gradients flow into it, which is wrong."""
    z0 = max(0.0, mean(ratios)) if ratios else 0.0
    return z0 if through else number(z0)


def number(value):
    return value.item() if torch.is_tensor(value) else value


def kahneman(marked, z0, beta, desirable, undesirable):
    return [desirable * (1 - torch.sigmoid(beta * (ratio - z0))) if mark else
            undesirable * (1 - torch.sigmoid(beta * (z0 - ratio))) for mark, ratio in marked]


def plain_step(rows, policy, reference, tokenizer, args, through=False):
    """(loss, metrics) of raw rows, in the order in which `mismatched` gets them."""
    def both(prompt, completion):
        with torch.no_grad():
            before = token_logps(reference, prompt, completion)
        return token_logps(policy, prompt, completion), before

    if args.loss == "sft":
        logps = [token_logps(policy, *tokens_of(tokenizer, row, "completion")) for row in rows]
        count = sum(map(len, logps))
        return -sum(some.sum() for some in logps) / count, {"tokens": count}
    weights = [args.kind_weights.get(row["kind"], 1.0) for row in rows]
    losses, logged = [], []
    if args.loss in ("kto", "factalign"):
        responses = [tokens_of(tokenizer, row, "completion") for row in rows]
        own = [both(*response) for response in responses]
        strange = [both(responses[i][0], responses[j][1]) for i, j in enumerate(shifted(rows))]
        ratios = [(row["label"], (pi - ref).sum()) for row, (pi, ref) in zip(rows, own)]
        z0 = reference_point([(pi - ref).sum() for pi, ref in strange], through)
        losses = kahneman(ratios, z0, args.beta, args.desirable_weight, args.undesirable_weight)
        loss = sum(w * some for w, some in zip(weights, losses)) / sum(weights)
        metrics = {"kl": number(z0), **rewards("", ratios, args.beta)}
        if args.loss == "kto":
            return loss, metrics
        parts = [sums_of_sentences(row, pi - ref) for row, (pi, ref) in zip(rows, own)]
        others = [ratio for j, (pi, ref) in zip(shifted(rows), strange)
                  for _, ratio in sums_of_sentences(rows[j], pi - ref)]
        z0 = reference_point(others, through)
        means = [mean(kahneman(some, z0, args.sentence_beta, args.sentence_desirable_weight,
                               args.sentence_undesirable_weight)) for some in parts if some]
        metrics |= {"sentence_kl": number(z0), **rewards("sentence_", sum(parts, []),
                                                        args.sentence_beta)}
        return loss + args.lam * mean(means), metrics
    nll = []
    for row in rows:
        (w, ref_w), (l, ref_l) = (both(*tokens_of(tokenizer, row, side))  # noqa: E741
                                  for side in ("chosen", "rejected"))
        nll.append((w.sum(), len(w)))
        reduce = torch.mean if args.loss == "ipo" else torch.sum
        w, l, ref_w, ref_l = map(reduce, (w, l, ref_w, ref_l))  # noqa: E741
        ref_w, ref_l = (0, 0) if args.loss == "cpo" else (ref_w, ref_l)
        h, beta, eps = (w - ref_w) - (l - ref_l), args.beta, args.label_smoothing
        losses.append({
            "dpo": -(1 - eps) * torch.log(torch.sigmoid(beta * h))
            - eps * torch.log(torch.sigmoid(-beta * h)),
            "ipo": (h - 1 / (2 * beta)) ** 2,
            "rso": (1 - beta * h) * (beta * h < 1),
            "cpo": -torch.log(torch.sigmoid(beta * h))}[args.loss])
        logged.append({"rewards/chosen": beta * (w - ref_w), "rewards/rejected": beta * (l - ref_l),
                       "rewards/margins": beta * h, "rewards/accuracies": 1.0 * (h > 0),
                       "logps/chosen": w, "logps/rejected": l})
    loss = sum(w * some for w, some in zip(weights, losses)) / sum(weights)
    metrics = {name: mean([row[name].item() for row in logged]) for name in logged[0]}
    if args.loss == "cpo":
        extra = -sum(some for some, _ in nll) / sum(count for _, count in nll)
        loss, metrics["nll_loss"] = loss + args.alpha * extra, extra.item()
    return loss, metrics


# ---------------------------------------------------------------------------------------------
# One step

def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """fp64 models some nats apart. near is likelier than far: log-ratios, and z0, above 0."""
    noise, found = torch.Generator().manual_seed(3), SimpleNamespace(folder=tiny_model)
    found.tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for name, size in (("near", 0.05), ("far", 0.2)):
        model = load(tiny_model, torch.float64)
        with torch.no_grad():
            for weight in model.parameters():
                weight += size * torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
        setattr(found, name, model)
    found.near_folder = tmp_path_factory.mktemp("near")
    copy.deepcopy(found.near).float().save_pretrained(found.near_folder)
    found.tokenizer.save_pretrained(found.near_folder)
    return found


def step_of(tokenizer, rows, args):
    """One step of all rows, in their order."""
    made = train.encode_rows(tokenizer, rows, args)
    return train.mismatched(made) if args.loss in ("kto", "factalign") else made


def step_of_05(model, reference, tokenizer, rows, args):
    """(loss, metrics, gradients)."""
    step = step_of(tokenizer, rows, args)
    known = {}
    if args.loss not in ("sft", "cpo"):
        with torch.no_grad():
            all_rows = step + train.others(step)
            known = train.completion_logps(reference, train.distinct(all_rows), args)
    model.zero_grad()
    loss, metrics = train.step_loss(model, step, known, args)
    loss.backward()
    return (loss.item(), {name: value.item() for name, value in metrics.items()},
            [weight.grad.clone() for weight in model.parameters()])


def gap(ours, theirs):
    """The largest difference of two gradients, in units of each weight's largest."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs))


UNEQUAL = ["--desirable-weight", 0.7, "--undesirable-weight", 1.3]
FACTALIGN = ["--loss", "factalign", *UNEQUAL, "--lam", 1.7, "--sentence-beta", 0.3,
             "--sentence-desirable-weight", 1.2, "--sentence-undesirable-weight", 0.4]
KINDS = ["--kind-weights", "fact=2,atomic=0.25"]
LOSSES = {
    "dpo": ["--loss", "dpo"], "smooth": ["--loss", "dpo", "--label-smoothing", 0.2],
    "dpo-kinds": ["--loss", "dpo", *KINDS], "ipo": ["--loss", "ipo"], "rso": ["--loss", "rso"],
    "cpo": ["--loss", "cpo", "--alpha", 0.7], "kto": ["--loss", "kto", *UNEQUAL],
    "kto-kinds": ["--loss", "kto", *KINDS], "factalign": FACTALIGN, "sft": ["--loss", "sft"]}


def rows_of(args):
    return PAIRS if args.loss in train.PAIRS else CLAIMS


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_the_plain_loop(name, swapped, world):
    """Loss, log row and every gradient, whatever the microbatch."""
    policy, reference = (world.far, world.near) if swapped else (world.near, world.far)
    args = flags(*LOSSES[name], "--beta", 0.05, "--dtype", "float32")
    right, logged = plain_step(rows_of(args), policy, reference, world.tokenizer, args)
    grads = torch.autograd.grad(right, list(policy.parameters()))
    if args.loss in ("kto", "factalign"):  # the case is one of a z0 above 0, or of 0
        assert all((value > 0.05) != swapped for key, value in logged.items() if "kl" in key)
        assert not swapped or logged["kl"] == 0
    for size in (1, 2, 8, 64):
        args.microbatch = size
        loss, metrics, found = step_of_05(policy, reference, world.tokenizer, rows_of(args), args)
        assert loss == pytest.approx(right.item(), abs=2e-8)
        assert metrics == pytest.approx(logged, rel=1e-7, abs=1e-7)
        assert gap(found, grads) < 1e-6


@pytest.mark.parametrize("name", ["kto", "factalign"])
def test_no_gradient_flows_through_z0(name, world):
    """With a gradient in z0 the loop is another one by far: the test above would see it."""
    args = flags(*LOSSES[name], "--beta", 0.05, "--dtype", "float32")
    _, _, found = step_of_05(world.near, world.far, world.tokenizer, CLAIMS, args)
    loss, _ = plain_step(CLAIMS, world.near, world.far, world.tokenizer, args, through=True)
    assert gap(found, torch.autograd.grad(loss, list(world.near.parameters()))) > 0.05


@pytest.mark.parametrize("name", ["dpo", "factalign"])
def test_gradient_checkpointing_changes_no_gradient(name, world):
    args = flags(*LOSSES[name], "--full", "--dtype", "float32", model=world.near_folder)
    plain, tokenizer = train.policy_of(args, "cpu")
    args.gradient_checkpointing = True
    saving, _ = train.policy_of(args, "cpu")
    calls, found = Counter(), {}
    for model in (plain, saving):
        model.double()
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(
                lambda *_, model=model: calls.update([model is saving]))
        found[model is saving] = step_of_05(model, world.far, tokenizer, rows_of(args), args)
    assert found[True][:2] == found[False][:2] and gap(found[True][2], found[False][2]) < 1e-6
    without = 2 * len(plain.model.layers) * (name == "factalign")  # partners, in two pieces
    assert calls[True] == 2 * calls[False] - without > calls[False]


# ---------------------------------------------------------------------------------------------
# Mismatched pairs

def bare(prompts):
    """A row for each prompt, a number; its completion is its own."""
    return [{"id": f"r{i}", "responses": [((prompt,), (i,))], "sentences": [i]}
            for i, prompt in enumerate(prompts)]


def rotation(prompts, order):
    """{row: row of its completion} by the smallest shift that never meets the same prompt."""
    n = len(order)
    for shift in range(1, n):
        found = {order[i]: order[(i + shift) % n] for i in range(n)}
        if all(prompts[a] != prompts[b] for a, b in found.items()):
            return found


def partners(rows):
    """What `mismatched` made of `bare` rows, in the form of `rotation`."""
    found = {}
    for row in rows:
        ((prompt,), (number,)), = row["other"]["responses"]
        assert row["responses"] == [((prompt,), (int(row["id"][1:]),))]
        assert row["other"]["sentences"] == [number]  # they travel with the completion
        found[int(row["id"][1:])] = number
    return found


def test_mismatched_is_the_smallest_shift_that_works(capsys):
    """All sequences of up to 6 rows of 3 prompts and up to 5 of 4; it fails only where no pairing
    at all could work: one prompt has more than half of the rows."""
    counts = Counter()
    sequences = [some for prompts, most in ((3, 6), (4, 5)) for n in range(1, most + 1)
                 for some in itertools.product(range(prompts), repeat=n)]
    for prompts in sequences:
        n = len(prompts)
        there = rotation(prompts, list(range(n)))
        by_prompt = rotation(prompts, sorted(range(n), key=lambda i: (prompts[i], i)))
        if max(Counter(prompts).values()) * 2 > n:
            assert there is None and by_prompt is None
            with pytest.raises(SystemExit) as refused:
                train.mismatched(bare(prompts))
            assert refused.value.code == 2 and "r0" in capsys.readouterr().err
            counts["refused"] += 1
        else:
            right = there or by_prompt
            assert sorted(right.values()) == list(range(n))
            assert partners(train.mismatched(bare(prompts))) == right, prompts
            counts["as they come" if there else "sorted"] += 1
    assert min(counts[name] for name in ("refused", "as they come", "sorted")) > 50


def test_sorted_by_prompt_leaves_none_that_could_be_paired():
    """Multisets of up to 12 rows and 6 prompts, by their counts."""
    shapes = [counts for k in range(1, 7) for counts in
              itertools.combinations_with_replacement(range(1, 9), k) if 2 <= sum(counts) <= 12]
    refused = 0
    for counts in shapes:
        prompts = [prompt for prompt, count in enumerate(counts) for _ in range(count)]
        prompts = prompts[::2] + prompts[1::2]
        try:
            found = partners(train.mismatched(bare(prompts)))
            assert all(prompts[a] != prompts[b] for a, b in found.items())
            assert sorted(found.values()) == list(range(len(prompts)))
            assert 2 * max(counts) <= len(prompts)
        except SystemExit:
            refused += 1
            assert 2 * max(counts) > len(prompts)
    assert 10 < refused < len(shapes) - 10


def test_a_step_of_one_row_is_refused(tiny_model, tmp_path):
    for loss in ("kto", "factalign"):
        done = run(tmp_path, tiny_model, "--loss", loss, rows=LANDS[:1])
        assert done.returncode == 2 and "land" in done.stderr and "--batch" in done.stderr
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------------------------------------
# Sentences

@pytest.fixture(scope="module")
def merging():
    """A byte-level tokenizer with merges: tokens such as " It" and ". It" that cross borders."""
    text = "It is big. It is in Asia. It is small.\n\nIt is old. " * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text[i:i + 9] for i in range(0, 400, 3)], trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=["<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def test_tokens_belong_to_the_sentence_that_they_start_in(merging):
    text = "It is big. It is in Asia.\n\n It is small. Big. It is old."
    sentences = ["It is big.", "It is in Asia.", "It is small.", "It is old."]
    spans = [(text.index(some), text.index(some) + len(some)) for some in sentences]
    right, start, crossing = [], 0, 0
    pieces = [merging.decode([token]) for token in merging(text)["input_ids"]]
    assert "".join(pieces) == text
    for piece in pieces:
        end = start + len(piece)
        first = next((at for at in range(start, end) if not text[at].isspace()), end)
        right.append(next((n for n, (a, b) in enumerate(spans) if a <= first < b), -1))
        crossing += len({n for n, (a, b) in enumerate(spans) if max(a, start) < min(b, end)}) > 1
        start = end
    assert train.sentence_ids(merging, text, spans) == right
    assert crossing and set(right) == {0, 1, 2, 3, -1} and max(map(len, pieces)) > 2


@pytest.mark.parametrize("text, sentences, spans", [
    ("A b. A b. C.", ["A b.", "A b.", "C."], [(0, 4), (5, 9), (10, 12)]),  # the same twice
    ("A b. A b.", [" A b.\n", "A b.", "A b."], [(0, 4), (5, 9), (0, 0)]),  # a third is not there
    ("A. B. C.", ["A.", "X.", "C."], [(0, 2), (0, 0), (6, 8)]),  # the search goes on
    ("A. B.", ["B.", "A."], [(3, 5), (0, 0)]),  # from left to right
    ("Oh. Oh no. Oh", ["Oh no.", "Oh"], [(4, 10), (11, 13)])])
def test_sentences_are_searched_from_left_to_right(text, sentences, spans):
    assert train.search(sentences, text) == spans


def test_rows_without_spans_are_rows_with_them(world):
    """FactAlign's released form ends in the same annotation, where each sentence is in the text."""
    args = flags("--loss", "factalign")
    searched = [claim(row["prompt_id"], PIECES[row["id"]], row["label"], row["id"][-1],
                      searched=True) for row in CLAIMS]
    given = [claim(row["prompt_id"], PIECES[row["id"]], row["label"], row["id"][-1])
             for row in CLAIMS]
    assert "sentence_spans" in given[0] and "sentence_spans" not in searched[0]
    found = [train.encode_rows(world.tokenizer, rows, args) for rows in (searched, given)]
    assert found[0] == found[1] and len(found[0][4]["sentences"]) == 3


def test_sentences_and_the_rest_add_up_to_the_response(world):
    """Token t has log-prob -(2 ** t), so that a sum names its tokens."""
    args = flags("--loss", "factalign", "--sentence-beta", 1.0)
    for row in CLAIMS:
        marks = row.get("sentence_label", [])
        bits, unlabelled, at = [], 0, 0
        for text, mark in PIECES[row["id"]]:
            for place, byte in enumerate(text.encode()):
                here = mark is not None and not (text[:2] == "  " and place == 0)
                bits.append(here and (text, mark))
                unlabelled += 0 if here else 2 ** at
                at += 1
        unlabelled += 2 ** at if row["finish"] == "stop" else 0
        whole, total = 2 ** (at + (row["finish"] == "stop")) - 1, unlabelled
        sums = []
        for n in range(len(marks)):
            alone = {**row, "sentence_label": [m == n for m in range(len(marks))]}
            other = asked("z", completion=said("x"), label=False, finish="stop")
            step = step_of(world.tokenizer, [alone, other], args)
            policy = {response: -2.0 ** torch.arange(len(response[1]), dtype=torch.float64)
                      for made in step + train.others(step) for response in made["responses"]}
            zero = {response: 0 * logps for response, logps in policy.items()}
            _, metrics = train.losses_of(step, policy, zero, args)
            sums.append(-metrics.get("sentence_rewards/chosen", torch.zeros(())).item())
            total += sums[-1]
        right = [sum(2 ** t for t, bit in enumerate(bits) if bit and bit[0] is text)
                 for text, mark in PIECES[row["id"]] if mark is not None]
        assert sums == right + [0] * (len(marks) - len(right))  # 0: not in the text
        assert total == whole


def test_without_sentences_factalign_is_kto(world):
    """Loss, log row and gradient; rows whose only sentence is not in the text are such rows."""
    rows = [{**row, "sentence_label": [], "completion_sentences": None} for row in CLAIMS[:-1]]
    for row in rows:
        row.pop("sentence_spans", None)
    rows.append(CLAIMS[-1])
    args = flags(*FACTALIGN, "--dtype", "float32")
    ours = step_of_05(world.near, world.far, world.tokenizer, rows, args)
    args.loss = "kto"
    kto = step_of_05(world.near, world.far, world.tokenizer, rows, args)
    assert ours[0] == pytest.approx(kto[0], abs=1e-12) and gap(ours[2], kto[2]) < 1e-9
    assert ours[1] == {**kto[1], "sentence_kl": 0.0}


def test_a_row_without_sentences_thins_out_nothing(world):
    """The second term is the mean over annotated rows: one more row changes KTO's part alone."""
    args = flags(*FACTALIGN, "--dtype", "float32")
    args.sentence_beta = 1e-9  # every sentence's loss is half its weight: (1.2 T + 0.4 F) / 2 n
    for rows in (CLAIMS, CLAIMS[:-1]):
        both, *_ = step_of_05(world.near, world.far, world.tokenizer, rows, args)
        kto = copy.copy(args)
        kto.loss = "kto"
        alone, *_ = step_of_05(world.near, world.far, world.tokenizer, rows, kto)
        right = mean([(1.2 + 0.4) / 4, (1.2 + 0.4) / 4, 1.2 / 2, 0.4 / 2, (2 * 1.2 + 0.4) / 6,
                      1.2 / 2])
        assert both - alone == pytest.approx(1.7 * right, abs=1e-6)


def test_the_sentences_of_z0_are_the_partners(world):
    args = flags(*FACTALIGN, "--dtype", "float32")
    rows = step_of(world.tokenizer, CLAIMS, args)
    step = [{**row, "other": {**row["other"], "sentences": [], "sentence_ids":
                              [-1] * len(row["other"]["responses"][0][1])}} for row in rows]
    with torch.no_grad():
        responses = train.distinct(rows + train.others(rows))
        known = train.completion_logps(world.far, responses, args)
        _, metrics = train.step_loss(world.near, step, known, args)
        _, whole = train.step_loss(world.near, rows, known, args)
    assert metrics["sentence_kl"] == 0 < whole["sentence_kl"]
    assert metrics["kl"] == whole["kl"]


@pytest.mark.parametrize("change", [
    {"sentence_label": [True]}, {"sentence_label": [1], "completion_sentences": ["It."]},
    {"sentence_label": [True, True], "completion_sentences": ["It."]},
    {"sentence_label": [True], "completion_sentences": ["It."], "sentence_spans": [[0, 3], [4, 5]]},
    {"label": None}, {"label": "true"}], ids=str)
def test_bad_annotations_are_refused(change, tiny_model, tmp_path):
    bad = {**asked("x", completion=said("It. Is."), label=True), **change}
    done = run(tmp_path, tiny_model, "--loss", "factalign", rows=[*LANDS, bad])
    assert done.returncode == 2 and f"prefs.jsonl:{len(LANDS) + 1}: expected" in done.stderr
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------------------------------------
# The command: where policy and reference start, and what is saved

LANDS = [claim(f"land{i}", [("It is big.", i % 2 == 0), (f" So are {i} others.", i % 3 == 0)]
               if i != 2 else [("Yes.", None)], i % 2 == 0, finish=("stop", "length")[i == 3])
         for i in range(7)]
ISLES = [pair(f"isle{i // 2}", "yes, it is" + "!" * i, "no" * (1 + i % 3), i) for i in range(7)]
STEP = ["--batch", 99, "--lr", 1e-3]


def inputs(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    return write_rows(folder / "prefs.jsonl", rows)


def command(folder, model, *words, rows, out="out"):
    return [str(word) for word in (
        ROOT / "05_train.py", "--prefs", inputs(folder, rows), "--out", folder / out,
        "--model", model, "--device", "cpu", *words)]


def run(folder, model, *words, rows, out="out"):
    """The command in this process: its exit code, stdout and stderr."""
    return run_argv(command(folder, model, *words, rows=rows, out=out))


def run_argv(argv):
    told, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", argv), redirect_stdout(told), redirect_stderr(err):
        try:
            code = train.main()
        except SystemExit as stop:
            code = stop.code
    if isinstance(code, str):  # sys.exit("what went wrong")
        code = print(code, file=err) or 1
    return SimpleNamespace(returncode=code, stdout=told.getvalue(), stderr=err.getvalue())


def first_row(folder, model, *words, rows, out="out"):
    """The first row of the log of a run of one step."""
    done = run(folder, model, *STEP, *words, rows=rows, out=out)
    assert done.returncode == 0, done.stderr
    row, = read_rows(folder / out / "log.jsonl")
    return row, done


@pytest.fixture(scope="module")
def tuned(tiny_model, tmp_path_factory):
    """What other runs begin from: two adapters and a full model, all of SFT."""
    folder = tmp_path_factory.mktemp("tuned")
    for name, words in (("one", ["--lora-r", 4]), ("two", ["--seed", 1]), ("full", ["--full"])):
        words += ["--loss", "sft", "--epochs", 25, "--batch", 4, "--lr", 1e-2]
        done = run(folder, tiny_model, *words, rows=LANDS, out=name)
        assert done.returncode == 0, done.stderr
    return folder


def with_adapter(model, adapter):
    return PeftModel.from_pretrained(load(model), adapter).eval()


STARTS = {"dpo": math.log(2), "ipo": 1 / (4 * 0.2 ** 2), "rso": 1.0, "kto": 0.5,
          "factalign": (1 + 1.7) / 2}


@pytest.mark.parametrize("words", [[], ["--full"], ["--adapter"], ["--adapter", "--full"],
                                   ["--adapter", "--dtype", "float32"]], ids=" ".join)
@pytest.mark.parametrize("loss", STARTS)
def test_the_first_step_says_the_value_at_the_reference(loss, words, tiny_model, tuned, tmp_path):
    words = [some for word in words for some in
             ([word, tuned / "one"] if word == "--adapter" else [word])]
    row, done = first_row(tmp_path, tiny_model, "--loss", loss, "--beta", 0.2, "--lam", 1.7, *words,
                          rows=ISLES if loss in train.PAIRS else LANDS)
    assert row["loss"] == pytest.approx(STARTS[loss], rel=1e-6)
    said, = re.findall("^step 0: loss (.+); (.+) where policy is reference$", done.stdout, re.M)
    assert said == (f"{STARTS[loss]:.4f}",) * 2


REFERENCES = {  # policy, --ref, the reference of the plain loop
    "base after an adapter": (["--adapter", "one"], "base", lambda base, t: load(base)),
    "base after a merged adapter": (["--adapter", "one", "--full"], "base",
                                    lambda base, t: load(base)),
    "an adapter": (["--adapter", "one"], "two", lambda base, t: with_adapter(base, t / "two")),
    "a model": (["--adapter", "one"], "full", lambda base, t: load(t / "full")),
    "an adapter for a new one": ([], "two", lambda base, t: with_adapter(base, t / "two"))}


@pytest.mark.parametrize("name", REFERENCES)
def test_another_reference(name, tiny_model, tuned, tmp_path):
    words, ref, reference = REFERENCES[name]
    words = [tuned / word if word == "one" else word for word in words]
    words += ["--ref", ref if ref == "base" else tuned / ref, "--dtype", "float32"]
    row, done = first_row(tmp_path, tiny_model, *words, rows=ISLES)
    policy = with_adapter(tiny_model, tuned / "one") if tuned / "one" in words else load(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        right, logged = plain_step(ISLES, policy, reference(tiny_model, tuned), tokenizer, flags())
    assert abs(right.item() - math.log(2)) > 0.005 and "step 0" not in done.stdout
    found = {key: row[key] for key in logged}
    assert row["loss"] == pytest.approx(right.item(), abs=1e-4)
    assert found == pytest.approx(logged, rel=1e-4, abs=1e-3)


def test_the_base_is_the_start_of_a_new_adapter(tiny_model, tmp_path):
    row, _ = first_row(tmp_path, tiny_model, "--ref", "base", rows=ISLES)
    start, _ = first_row(tmp_path, tiny_model, rows=ISLES, out="start")
    assert row == start and row["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_training_goes_on_from_an_adapter(full, tiny_model, tuned, tmp_path):
    """Its model's loss at step 0, and a tiny step away from its weights after it."""
    row, _ = first_row(tmp_path, tiny_model, "--adapter", tuned / "one", "--loss", "sft", "--lr",
                       1e-6, "--dtype", "float32", *["--full"] * full, rows=LANDS)
    before = with_adapter(tiny_model, tuned / "one")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        right, _ = plain_step(LANDS, before, None, tokenizer, flags("--loss", "sft"))
        base, _ = plain_step(LANDS, load(tiny_model), None, tokenizer, flags("--loss", "sft"))
    assert row["loss"] == pytest.approx(right.item(), abs=1e-5) and base - right > 0.2
    if full:
        found, wanted = load(tmp_path / "out").state_dict(), before.merge_and_unload().state_dict()
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            assert (found[name] - weight).abs().max() <= 2 ** -8 * weight.abs().max() + 2e-6, name
        return
    found, wanted = (load_file(folder / "adapter_model.safetensors")
                     for folder in (tmp_path / "out", tuned / "one"))
    assert found.keys() == wanted.keys()
    gaps = [(found[name] - weight).abs().max().item() for name, weight in wanted.items()]
    assert 0 < min(gaps) and max(gaps) < 2e-6  # AdamW's first step is the rate
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("words", [[], ["--dtype", "float32"], ["--adapter"]], ids=" ".join)
def test_a_merged_model_is_the_model_and_its_adapter(words, tiny_model, tuned, tmp_path):
    words = words + [tuned / "one"] * ("--adapter" in words) + ["--epochs", 4, "--lr", 1e-2]
    for out, more in (("apart", []), ("merged", ["--merge"])):
        done = run(tmp_path, tiny_model, *words, *more, rows=ISLES, out=out)
        assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert not list((tmp_path / "apart").glob("model*"))
    plain = with_adapter(tiny_model, tmp_path / "apart").merge_and_unload()
    merged, tokenizer = load(tmp_path / "merged"), AutoTokenizer.from_pretrained(
        tmp_path / "merged")
    base, kinds = load(tiny_model), load_file(tmp_path / "merged" / "model.safetensors").values()
    dtype = torch.float32 if "float32" in words else torch.bfloat16
    assert {weight.dtype for weight in kinds} == {dtype}
    moved = 0
    for row in ISLES:
        for side in ("chosen", "rejected"):
            response = tokens_of(tokenizer, row, side)
            with torch.no_grad():
                ours, right, start = (token_logps(m, *response) for m in (merged, plain, base))
            assert (ours - right).abs().max() < 0.05
            moved = max(moved, (right - start).abs().max())
    assert moved > 0.5

    config = json.loads((tmp_path / "apart" / "adapter_config.json").read_text())
    assert config["r"] <= 64 and not config["modules_to_save"] and config["bias"] == "none"
    assert not config["use_dora"] and not config["use_rslora"] and not config["rank_pattern"]
    names = load_file(tmp_path / "apart" / "adapter_model.safetensors")
    parts = {name.split(".")[-3] for name in names}
    assert parts == {f"{some}_proj" for some in ("q", "k", "v", "o", "gate", "up", "down")}
    assert parts == {name.rsplit(".")[-1] for name in config["target_modules"]}


# ---------------------------------------------------------------------------------------------
# Two processes

TWINS = [claim(name, [("It is.", True)], n == 0, n) for name in ("x", "y") for n in range(2)]
TOGETHER = {  # rows, flags. A step of one row (sft) leaves a process without any
    "sft": (LANDS[:5], ["--loss", "sft", "--batch", 2]),
    "dpo": (ISLES, ["--loss", "dpo", "--batch", 2, "--microbatch", 2]),
    "kto": (LANDS, ["--loss", "kto", "--batch", 4, "--save-every", 2]),
    "factalign": (LANDS, [*FACTALIGN, "--batch", 4]),
    "lora": (ISLES, ["--ref", "base", "--batch", 4]),
    "twins": (TWINS, ["--loss", "sft", "--batch", 4])}  # the same response twice
LONG = ["--loss", "factalign", "--batch", 4, "--epochs", 40, "--save-every", 5, "--full", "--dtype",
        "float32", "--lr", 1e-4]
DRIVER = '''
import json, os, runpy, sys
import accelerate

class Meeting(accelerate.PartialState):  # as the first one of a process is
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.wait_for_everyone()

    def destroy_process_group(self, group=None):
        """The next command of this driver needs it."""

accelerate.PartialState = Meeting
leave, os._exit = os._exit, sys.exit
for argv in json.load(open(sys.argv[1])):
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
sys.stdout.flush()
leave(0)
'''


def command_of(name, folder, model):
    rows, words = TOGETHER[name]
    words = [*words, "--epochs", 2, "--dtype", "float32", "--lr", 1e-3]
    return command(folder / name, model, *words, *["--full"] * (name != "lora"), rows=rows)


def launch(folder, argv):
    with socket.socket() as some:
        some.bind(("localhost", 0))
        port = some.getsockname()[1]
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "--main_process_port", str(port), *map(str, argv)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=open(f"{folder}-stdout", "w"), stderr=open(f"{folder}-stderr", "w"))


def end(process):
    """kill -9 to the launcher and all that it started; torchrun's workers lead their own groups."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for signal_ in (signal.SIGSTOP, signal.SIGKILL):
        for member in family:
            member.send_signal(signal_)
    process.wait()
    psutil.wait_procs(family)
    return len(family)


@pytest.fixture(scope="module")
def processes(tiny_model, tmp_path_factory):
    """All cases and a long run by two processes, one after the other, in one launch; beside it the
    same long run, killed in its middle and started again."""
    folder = tmp_path_factory.mktemp("processes")
    jobs = folder / "jobs.json"
    whole, argv = (command(folder / name, tiny_model, *LONG, rows=LANDS)
                   for name in ("whole", "long"))
    jobs.write_text(json.dumps(
        [*(command_of(name, folder, tiny_model) for name in TOGETHER), whole]))
    (folder / "driver.py").write_text(DRIVER)
    running = {"all": launch(folder / "all", [folder / "driver.py", jobs]),
               "killed": launch(folder / "killed", argv)}
    out, limit = folder / "long" / "out", time.time() + 90
    try:
        while not any(path.stem >= "step-0000030" for path in out.glob("step-*.pt")):
            assert time.time() < limit and running["killed"].poll() is None, (
                folder / "killed-stderr").read_text()[-2000:]
            time.sleep(0.01)
        assert end(running["killed"]) >= 3
        left = {path.name: path.read_bytes() for path in out.iterdir()}
        running["again"] = launch(folder / "again", argv)
        codes = {name: running[name].wait(90) for name in ("all", "again")}
    finally:
        for process in running.values():
            if process.poll() is None:
                end(process)
    return SimpleNamespace(folder=folder, codes=codes, left=left)


def compare(one, two):
    """Two finished folders: the same files, log rows to 1e-5, weights but for bf16's last bit."""
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    logs = [read_rows(folder / "log.jsonl") for folder in (one, two)]
    assert [row["step"] for row in logs[1]] == list(range(len(logs[0])))
    for row, right in zip(logs[1], logs[0], strict=True):
        for key, value in right.items():  # z0 is in nats: fp32 resolves sums of 500 to 3e-5
            close = 1e-4 if key in ("kl", "sentence_kl") else 1e-5
            assert row[key] == pytest.approx(value, rel=1e-5, abs=close), key
        assert row.keys() == right.keys()
    name, = (path.name for path in one.glob("*model.safetensors"))
    weights = [load_file(folder / name) for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    equal = total = 0
    for key, right in weights[0].items():
        ulp = 2 ** -7 if right.dtype == torch.bfloat16 else 1e-4
        apart = (weights[1][key].float() - right.float()).abs()
        assert (apart <= ulp * right.float().abs() + 1e-5).all(), key
        equal += (apart <= 1e-6).sum().item()
        total += apart.numel()
    assert equal > 0.99 * total


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_are_one(name, processes, tiny_model, tmp_path):
    assert processes.codes["all"] == 0, (processes.folder / "all-stderr").read_text()[-2000:]
    argv = command_of(name, tmp_path, tiny_model)
    alone = run_argv(argv)
    assert alone.returncode == 0, alone.stderr
    folder = processes.folder / name
    compare(tmp_path / name / "out", folder / "out")
    left = sorted(path.name for path in folder.iterdir() if "reference-" not in path.name)
    assert left == ["out", "out.args.json", "prefs.jsonl"]
    assert len(list(folder.glob("reference-*"))) == (TOGETHER[name][1][:2] != ["--loss", "sft"])


def test_each_response_goes_through_one_process(tiny_model, monkeypatch):
    """The shares of the cases above differ by one, but for dpo; in a step of sft one has none."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), load(tiny_model)
    monkeypatch.setattr(train, "RANKS", 2)
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda told: told)  # nobody else's
    monkeypatch.setattr(train, "piece_logps", lambda model, piece: tuple(
        torch.zeros(len(completion)) for _, completion in piece))
    for name in ("sft", "dpo", "kto", "factalign"):
        rows, words = TOGETHER[name]
        args, sizes = flags(*words), []
        rows = train.encode_rows(tokenizer, rows, args)
        steps = train.plan(rows, args, args.batch, 2)
        assert Counter(row["id"] for step in steps for row in step) == {
            row["id"]: 2 for row in rows}
        for responses in [train.distinct(some) for step in steps
                          for some in (step, train.others(step))]:
            shares = []
            for rank in range(2):
                monkeypatch.setattr(train, "RANK", rank)
                shares.append([*train.completion_logps(model, responses, args)])
            assert sorted(sum(shares, [])) == sorted(responses)
            sizes.append(tuple(map(len, shares)))
        assert {a - b for a, b in sizes} == ({0} if name == "dpo" else {0, 1}), sizes
        assert ((1, 0) in sizes) == (name == "sft"), sizes


def test_two_processes_print_once(processes):
    told = (processes.folder / "all-stdout").read_text()
    assert told.count("step 0: loss") == 4  # dpo, kto, factalign twice; sft and --ref base say none


def test_two_killed_processes_go_on(processes):
    """To the same bytes as those that were left alone, with one set of checkpoints before."""
    assert 1 <= sum(name.startswith("step-") for name in processes.left) <= 3  # two, and a new one
    assert "log.jsonl" in processes.left and "README.md" not in processes.left
    assert processes.codes["again"] == 0, (processes.folder / "again-stderr").read_text()[-2000:]
    assert "step 0" not in (processes.folder / "again-stdout").read_text()  # it did go on
    whole, again = ({path.name: path.read_bytes() for path in
                     (processes.folder / name / "out").iterdir() if path.name != "README.md"}
                    for name in ("whole", "long"))
    assert again == whole and {"log.jsonl", "model.safetensors"} <= whole.keys()
    steps = [json.loads(line)["step"] for line in again["log.jsonl"].splitlines()]
    assert steps == list(range(len(steps))) and len(steps) == 80


def test_only_the_first_process_says_that_all_is_done(tiny_model, tmp_path, monkeypatch):
    words = ["--loss", "sft", *STEP]
    assert run(tmp_path, tiny_model, *words, rows=LANDS).returncode == 0
    assert "finished" in run(tmp_path, tiny_model, *words, rows=LANDS).stdout
    monkeypatch.setattr(train, "RANK", 1)
    assert run(tmp_path, tiny_model, *words, rows=LANDS).stdout == ""


def test_a_run_that_dies_before_its_first_step_goes_on(tiny_model, tmp_path, monkeypatch):
    """The reference's log-probs take minutes: a kill there is like any other."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "completion_logps", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tiny_model, rows=ISLES)
    done = run(tmp_path, tiny_model, rows=ISLES)
    assert done.returncode == 0, done.stderr
