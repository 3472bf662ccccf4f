"""05_train.py: rows, the plan, log-probs and updates against a plain loop written apart, LoRA, the
reference's cache, kills. In this process where that will do.
"""
import copy
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from types import SimpleNamespace
from unittest import mock

import peft
import pytest
import test_reliability as reliability
import torch
import transformers
from common import load_model, read_jsonl
from conftest import read_rows, stage, write_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig,
                          GraniteForCausalLM, PreTrainedTokenizerFast)

train = stage("05_train")
launcher, one_thread = reliability.launcher, reliability.one_thread  # fixtures


def said(text):
    return [{"role": "assistant", "content": text}]


def pair(name, chosen="yes yes.", rejected="no no.", n=0, finish=("stop", "stop")):
    return {"id": f"{name}>{n}", "prompt_id": name,
            "prompt": [{"role": "user", "content": f"Is {name} a country?"}],
            "chosen": said(chosen), "rejected": said(rejected),
            "finish": dict(zip(("chosen", "rejected"), finish))}


def target(name, text="yes yes.", finish="stop", n=0):
    return {"id": f"{name}/{n}", "prompt_id": name,
            "prompt": [{"role": "user", "content": f"Is {name} a country?"}],
            "completion": said(text), "finish": finish}


TOY = [pair(f"land{i}", "yes yes.", ["no no.", "nope, no."][n], n, (("stop", "length")[n], "stop"))
       for i in range(8) for n in range(2)]
HELD = [pair(f"isle{i}") for i in range(4)]
# Of one prompt five pairs that share the chosen response, of two others one and two.
UNEVEN = [*(pair("a", "yes", "no" * n, n) for n in range(1, 6)), pair("b", "y", "nope, it is not"),
          *(pair("c", text, "n", n, ("length", "stop")) for n, text in enumerate(["y.", "y, yes"]))]
TARGETS = [target(name, text, end, n) for n, (name, text, end) in enumerate([
    ("a", "yes", "stop"), ("a", "yes, it is", "length"), ("b", "y", "stop"), ("b", "y", "stop"),
    ("c", "it is " * 5, "stop"), ("d", "so", "length"), ("e", "yes", "stop")])]


def command(folder, model, *flags, rows=TOY, held=HELD, out="tuned"):
    """The command line of a run in `folder`, with its inputs written."""
    folder.mkdir(exist_ok=True)
    argv = ["05_train.py", "--prefs", write_rows(folder / "prefs.jsonl", rows),
            "--out", folder / out, "--model", model, "--device", "cpu", "--lr", 1e-3, *flags]
    return argv + (["--eval-prefs", write_rows(folder / "held.jsonl", held)] if held else [])


def run_train(*args, **kwargs):
    """The command in this process: its exit code, stdout and stderr."""
    argv, out, err = command(*args, **kwargs), io.StringIO(), io.StringIO()
    with (mock.patch.object(sys, "argv", list(map(str, argv))), redirect_stdout(out),
          redirect_stderr(err)):
        try:
            code = train.main()
        except SystemExit as end:
            code = end.code
    if isinstance(code, str):  # sys.exit("what went wrong")
        code = print(code, file=err) or 1
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def settings(**changes):
    """Flags as the functions take them; fp64 weights make the right answer sharp."""
    with mock.patch.object(sys, "argv", ["05_train.py", "--prefs", "x", "--out", "y"]):
        flags = vars(train.parse_args())
    assert not changes.keys() - flags.keys()
    return SimpleNamespace(**{
        **flags, "dtype": "float32", "lr": 1e-3, "warmup": 0.0, "microbatch": 32,
        "save_every": 0, "lora_r": 4, **changes})


def loop(folder, model, steps, reference, args):
    """`train` with its log in `folder`; the rows of the log."""
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        train.train(model, steps, [], reference, args, "key", folder, log)
    return read_rows(folder / "log.jsonl")


def reference_of(folder, model, steps, args):
    args.out = folder / "tuned"
    return train.reference_logps(model, steps, args, train.fingerprint(model, steps, args))


def load(folder):
    return load_model(str(folder), dtype="float32", device="cpu")[:2]


def encoded(tokenizer, rows, **changes):
    args = settings(loss="sft" if "completion" in rows[0] else "dpo", **changes)
    return train.encode_rows(tokenizer, rows, args)


def plain_logp(model, response):
    """One response at a time, the whole sequence through the whole model."""
    prompt, completion = response
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids).logits.log_softmax(-1)[0]
    return sum(logps[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1]))


def names(folder):
    return {path.name for path in folder.iterdir()}


def bytes_of(folder, names=("log.jsonl", "model.safetensors", "adapter_model.safetensors")):
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


# ---------------------------------------------------------------------------------------------
# Rows and tokens

def test_end_of_turn_only_where_the_model_ended(tiny_model):
    _, tokenizer = load(tiny_model)
    ask, end = [{"role": "user", "content": "Who?"}], tokenizer.eos_token_id
    for text in ("It is.", "It <|im_end|> is. <|im_start|>user", "<|im_end|>"):
        prompt, stop = train.encode(tokenizer, ask, text, "stop")
        _, length = train.encode(tokenizer, ask, text, "length")
        assert stop[-1] == end and stop.count(end) == 1  # also where the text spells it out
        assert length == stop[:-1] and end not in length
        assert tokenizer.decode(length) == text
        assert tokenizer.decode(prompt) == ("<|im_start|>user\nWho?<|im_end|>\n"
                                            "<|im_start|>assistant\n")


def test_long_rows_are_left_out_whole(tiny_model):
    _, tokenizer = load(tiny_model)
    rows = [pair("a"), pair("b", chosen="x" * 300), pair("c", rejected="x" * 300)]
    whole = encoded(tokenizer, rows)
    assert [row["id"] for row in whole] == ["a>0", "b>0", "c>0"]
    assert encoded(tokenizer, rows, max_length=200) == whole[:1]
    longest = max(len(prompt) + len(completion) for prompt, completion in whole[0]["responses"])
    assert len(encoded(tokenizer, rows[:1], max_length=longest)) == 1
    assert len(encoded(tokenizer, rows[:1], max_length=longest - 1)) == 0
    rows = [target("a"), target("b", "", "length")]  # not one token to train on
    assert [row["prompt_id"] for row in encoded(tokenizer, rows)] == ["a"]


def test_rows_of_others_are_whole(tiny_model, tmp_path):
    """TRL's pairs and completions say no finish; 04's targets do, and more."""
    _, tokenizer = load(tiny_model)

    def read(rows, loss):
        found = read_jsonl(write_rows(tmp_path / "rows.jsonl", rows), {"prompt": (str, list)},
                           parts=lambda row: train.lacks(row, loss))
        return train.encode_rows(tokenizer, found, settings(loss=loss))

    def texts(row):  # "$" where the turn ends
        return [tokenizer.decode(c).replace("<|im_end|>", "$") for _, c in row["responses"]]

    row = pair("a")
    del row["finish"], row["prompt_id"], row["id"]
    found, = read([row], "dpo")
    assert texts(found) == ["yes yes.$", "no no.$"]
    assert found["prompt_id"] == json.dumps(row["prompt"]) and found["id"] == "rows-1"
    row["finish"] = {"rejected": "length"}  # says nothing of the other
    found, = read([row], "dpo")
    assert texts(found) == ["yes yes.$", "no no."]
    rows = [{"prompt": row["prompt"], "completion": said("so.")},
            {"prompt": "Who?", "completion": said("so.")},
            {**target("b", "it", "length"), "score": 0.5, "kind": "fact", "topic": "B"}]
    found = read(rows, "sft")
    assert [texts(r) for r in found] == [["so.$"], ["so.$"], ["it"]]
    asked = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found[1]["responses"][0][0]) == asked
    assert [r["prompt_id"] for r in found][::2] == [json.dumps(row["prompt"]), "b"]
    assert [r["kind"] for r in found] == ["", "", "fact"]
    unsaid = [{**pair(name), "prompt_id": None, "kind": None} for name in "ab"]  # null: unsaid, too
    found = read(unsaid, "dpo")
    assert [r["prompt_id"] for r in found] == [json.dumps(row["prompt"]) for row in unsaid]
    assert [r["kind"] for r in found] == ["", ""]


# ---------------------------------------------------------------------------------------------
# The plan

def lengths_to_plan(*groups, kind=""):
    """Rows as `plan` takes them: of each group n pairs, which share their first response."""
    return [{"id": f"{kind}{g}/{n}", "prompt_id": f"{kind}{g}", "kind": kind,
             "responses": [((g,), (0,)), ((g,), (1,) * (n + 1))]}
            for g, size in enumerate(groups) for n in range(size)]


def ids_of(rows):
    return [row["id"] for row in rows]


def test_plan_keeps_groups_whole_and_uses_each_pair_once_an_epoch():
    pairs = lengths_to_plan(*(1 + g % 5 for g in range(40)))
    before = copy.deepcopy(pairs)
    steps = train.plan(pairs, settings(seed=3), 8, 2)
    random.seed(5)  # nobody else's dice
    assert steps == train.plan(pairs, settings(seed=3), 8, 2) and pairs == before
    assert steps != train.plan(pairs, settings(seed=4), 8, 2)
    first, second = (ids_of(sum(steps[n:n + 15], [])) for n in (0, 15))
    assert len(steps) == 30  # an epoch ends with a step: 120 pairs are 15 steps of 8
    assert sorted(first) == sorted(second) == sorted(ids_of(pairs)) and first != second
    for step in steps:
        for group, count in Counter(row["prompt_id"] for row in step).items():
            assert count == 1 + int(group) % 5
        longest = {row["prompt_id"]: len(row["responses"][1][1]) for row in step}
        assert list(longest.values()) == sorted(longest.values())  # little padding
    assert any(len({row["prompt_id"] for row in step}) > 1 for step in steps)


@pytest.mark.parametrize("sizes, batch", [
    ([1] * 25, 8), ([1] * 3, 8), ([1] * 65, 16), ([2] * 31, 8), ([3] * 20, 8), ([5] * 17, 8),
    ([7] * 9, 20), ([1, 2, 3, 4, 5] * 8, 8), ([1, 6] * 11, 16)])
def test_plan_fills_steps_evenly(sizes, batch):
    """No short last step: all are within one group of the mean; of equal groups, of each other."""
    for seed in range(10):
        steps = train.plan(lengths_to_plan(*sizes), settings(seed=seed), batch, 1)
        counts, mean = [len(step) for step in steps], sum(sizes) / len(steps)
        assert len(steps) == -(-sum(sizes) // batch)
        assert all(abs(count - mean) < max(sizes) for count in counts)
        assert len(set(sizes)) > 1 or max(counts) - min(counts) <= max(sizes)


def test_plan_of_a_large_group_and_of_targets():
    big = lengths_to_plan(20)
    assert train.plan(big, settings(), 8, 1) == [big]
    # Targets share no response: those of a prompt need no common step.
    alone = [{**row, "responses": row["responses"][1:]} for row in lengths_to_plan(5, 20)]
    steps = train.plan(alone, settings(loss="sft"), 8, 1)
    assert sorted(map(len, steps)) == [6, 6, 6, 7]
    assert any(len({row["prompt_id"] for row in step}) == 2 for step in steps)
    assert sorted(ids_of(sum(steps, []))) == sorted(ids_of(alone))
    for step in steps:  # neighbours in length, so that a piece is little padding
        longest = [len(row["responses"][0][1]) for row in step]
        assert longest == sorted(longest)


def test_halves_give_each_kind_an_equal_part_and_the_smaller_goes_round():
    facts, style = lengths_to_plan(*[2] * 20, kind="fact"), lengths_to_plan(*[1] * 12, kind="style")
    steps = train.plan(facts + style, settings(), 8, 3, halves=True)
    assert len(steps) == 30 and steps == train.plan(facts + style, settings(), 8, 3, True)
    for epoch in (steps[:10], steps[10:20], steps[20:]):
        for step in epoch:
            assert Counter(row["kind"] for row in step) == {"fact": 4, "style": 4}
        drawn = Counter(ids_of(sum(epoch, [])))
        assert [drawn[name] for name in ids_of(facts)] == [1] * 40  # the larger: once an epoch
        assert {drawn[name] for name in ids_of(style)} == {3, 4}  # 40 draws from 12
        for a in range(0, 9, 3):  # a round leaves nobody out
            some = [row for step in epoch[a:a + 3] for row in step if row["kind"] == "style"]
            assert sorted(ids_of(some)) == sorted(ids_of(style))
    counts = {Counter(row["kind"] for row in step)["style"]
              for step in train.plan(facts + style, settings(), 8, 3)}
    assert len(counts) > 1  # mixed where nobody asks for halves


@pytest.mark.parametrize("schedule, fall", [
    ("linear", lambda k: 1 - k / 16), ("constant", lambda k: 1),
    ("cosine", lambda k: math.cos(math.pi * k / 32) ** 2)])
def test_rate_rises_then_falls(schedule, fall):
    args = settings(warmup=0.2, schedule=schedule)
    shares = [train.rate(step, 20, args) for step in range(20)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[4:] == pytest.approx([fall(k) for k in range(16)])
    assert shares[12] == pytest.approx(1 if schedule == "constant" else 0.5)
    assert train.rate(0, 1, settings(warmup=0.5, schedule=schedule)) == 1
    assert train.rate(0, 9, settings(warmup=0.0, schedule=schedule)) == 1


# ---------------------------------------------------------------------------------------------
# Log-probabilities

def clock_model():
    """A stand-in whose token 1 has log-probability -(2 ** t) at position t: sums name positions."""
    def base_model(input_ids, use_cache):
        at = torch.arange(input_ids.shape[1], dtype=torch.float64)
        p = torch.exp(-2.0 ** at)
        logits = torch.stack([torch.log1p(-p), torch.log(p)], -1)  # (T, V = 2)
        return SimpleNamespace(last_hidden_state=logits.expand(len(input_ids), -1, -1))

    return SimpleNamespace(device=torch.device("cpu"), base_model=base_model,
                           config=SimpleNamespace(get_text_config=SimpleNamespace),
                           get_output_embeddings=lambda: lambda hidden: hidden)


@pytest.mark.parametrize("head", [512, 3, 1])
def test_the_shift_in_powers_of_two(head, monkeypatch):
    monkeypatch.setattr(train, "HEAD", head)
    responses = [((0, 0, 0), (1, 1)), ((0,), (1, 1, 1, 1)), ((0, 1), (1,))]
    found = train.piece_logps(clock_model(), responses)
    # completion tokens at 3, 4 are scored at 2, 3; at 1..4 by 0..3; at 2 by 1
    expected = [[-4, -8], [-1, -2, -4, -8], [-2]]
    for logps, right in zip(found, expected, strict=True):
        assert logps.tolist() == pytest.approx(right, abs=1e-9)


def test_log_probs_match_the_plain_way(tiny_model):
    model, tokenizer = load(tiny_model)
    rows = [pair(f"{'x' * i}", "y" * (1 + 7 * i), "n" * (30 - i), 0, ("stop", "length"))
            for i in range(6)]  # several pieces, all lengths different
    responses = train.distinct(encoded(tokenizer, rows))
    found = train.completion_logps(model, responses, settings())
    assert list(found) == responses and len(found) == 12  # three pieces and more
    for (prompt, completion), logps in found.items():
        assert logps.shape == (len(completion),) and logps.dtype == torch.float32
        right = plain_logp(model, (prompt, completion)).item()
        assert logps.sum().item() == pytest.approx(right, abs=1e-3)
    rough = train.completion_logps(model, responses, settings(dtype="bfloat16"))  # by autocast
    gaps = [(logps - found[response]).abs().max() for response, logps in rough.items()]
    assert 1e-4 < max(gaps) < 0.1 and rough[responses[0]].dtype == torch.float32


def test_a_shared_response_goes_through_once(tiny_model, monkeypatch):
    model, tokenizer = load(tiny_model)
    rows, seen = encoded(tokenizer, UNEVEN[:5]), []
    monkeypatch.setattr(train, "piece_logps", lambda model, piece: seen.extend(piece) or tuple(
        torch.zeros(len(completion)) for _, completion in piece))
    reference = {response: torch.zeros(len(response[1])) for response in train.distinct(rows)}
    with torch.no_grad():  # then nothing is computed again, either
        train.step_loss(model, rows, reference, settings(microbatch=2))
    assert len(seen) == 6 == len(set(seen))  # 5 pairs, one chosen
    lengths = [len(p) + len(c) for p, c in seen]
    assert lengths == sorted(lengths)


def gradients(model, rows, args):
    """One step over all rows, far from the reference: its loss, metrics and gradients, how often
    pieces went through the model, how many bytes the graph held before the gradient came."""
    step, = train.plan(rows, args, 99, 1)
    noise = torch.Generator().manual_seed(5)
    reference = {(p, c): 5 * torch.randn(len(c), dtype=torch.float64, generator=noise)
                 for p, c in train.distinct(rows)}
    model.zero_grad()
    held = []
    with mock.patch.object(train, "piece_logps", mock.Mock(wraps=train.piece_logps)) as pieces:
        with torch.autograd.graph.saved_tensors_hooks(
                lambda saved: held.append(saved.nbytes) or saved, lambda saved: saved):
            loss, metrics = train.step_loss(model, step, reference, args)
        loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()
             if weight.requires_grad}
    return SimpleNamespace(loss=loss.item(), metrics=metrics, of=found, reference=reference,
                           passes=pieces.call_count, held=sum(held))


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 1e-6), (torch.float64, 2e-8)])
def test_pieces_and_chunks_change_no_gradient(kind, tolerance, tiny_model, monkeypatch):
    """A graph that is kept, pieces that are computed again, the head in chunks: all as plain."""
    model, tokenizer = load(tiny_model)
    model, rows = model.to(kind), encoded(tokenizer, UNEVEN)
    found = {size: gradients(model, rows, settings(microbatch=size)) for size in (32, 11, 1, 2, 3)}
    # 11 responses, on a CPU at most 4 a piece: where they outnumber the microbatch twice
    assert {size: one.passes for size, one in found.items()} == {
        32: 3, 11: 3, 1: 2 * 11, 2: 2 * 6, 3: 2 * 4}
    assert all(found[size].held < found[32].held / 20 for size in (1, 2, 3))
    monkeypatch.setattr(train, "HEAD", 3)
    found["chunks"] = gradients(model, rows, settings())
    found["both"] = gradients(model, rows, settings(microbatch=2))

    model.zero_grad()
    reference, margins = found[32].reference, []
    for row in rows:
        policy = [plain_logp(model, response) for response in row["responses"]]
        ref = [reference[response].sum() for response in row["responses"]]
        margins.append(0.1 * ((policy[0] - ref[0]) - (policy[1] - ref[1])))
    right = sum(-logsigmoid(margin) for margin in margins) / len(rows)
    right.backward()
    assert max(margins) - min(margins) > 1  # pairs weigh differently
    for one in found.values():
        assert one.loss == pytest.approx(right.item(), abs=tolerance)
        mean = sum(margins).item() / len(rows)
        assert one.metrics["rewards/margins"].item() == pytest.approx(mean, rel=1e-5)
        for name, weight in model.named_parameters():
            gap, largest = (one.of[name] - weight.grad).abs().max(), weight.grad.abs().max()
            assert gap <= min(tolerance, 1e-5 * largest), name


def dropping(tiny_model, folder):
    """The tiny model, and an adapter of it, that drop half of what they can while they train."""
    shutil.copytree(tiny_model, folder / "model")
    for name, change in (("model/config.json", {"attention_dropout": 0.5}),
                         ("adapter/adapter_config.json", {"lora_dropout": 0.5})):
        if name.startswith("adapter"):
            args = settings(model=str(folder / "model"))
            model, _ = train.policy_of(args, "cpu")
            for weight in model.parameters():  # B is 0 in a new one
                weight.data += 0.01 * weight.requires_grad
            model.save_pretrained(folder / "adapter")
        config = json.loads((folder / name).read_text())
        assert change.keys() <= config.keys()
        (folder / name).write_text(json.dumps(config | change))
    return {"model": str(folder / "model"), "adapter": str(folder / "adapter")}


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_computed_again_is_the_same_and_nothing_is_dropped(
        dtype, full, tiny_model, tmp_path):
    """Layers twice with --gradient-checkpointing, pieces twice where responses outnumber the
    microbatch, both: the gradient is that of a graph that is kept, to the bit."""
    found, start = {}, dropping(tiny_model, tmp_path)
    for microbatch in (32, 4):  # both make pieces of 4
        for again in (False, True):
            args = settings(**start, full=full, dtype=dtype, microbatch=microbatch,
                            gradient_checkpointing=again)
            model, tokenizer = train.policy_of(args, "cpu")
            calls = []
            for name, module in model.named_modules():
                if name.endswith("mlp"):  # a part of each layer
                    module.register_forward_pre_hook(lambda *_: calls.append(1))
            rows = encoded(tokenizer, UNEVEN)
            found[microbatch, again] = gradients(model, rows, args), len(calls)
    assert {key: count for key, (_, count) in found.items()} == {  # 3 pieces, 2 layers
        (32, False): 6, (32, True): 12, (4, False): 12, (4, True): 18}
    kept, _ = found[32, False]
    for one, _ in found.values():
        assert one.loss == kept.loss and one.of.keys() == kept.of.keys()
        for name, gradient in one.of.items():
            assert torch.equal(gradient, kept.of[name]) and gradient.any(), name
    assert found[32, True][0].held < kept.held / 2
    assert model.training is False


# ---------------------------------------------------------------------------------------------
# Updates

def plain_loss(loss, policy, reference, rows):
    """(loss to minimise, what its log row must hold) of a step, pair by pair, one by one."""
    if loss == "sft":
        tokens = sum(len(completion) for row in rows for _, completion in row["responses"])
        mean = sum(-plain_logp(policy, row["responses"][0]) for row in rows) / tokens
        return mean, {"tokens": tokens}
    losses, logged = [], []
    for row in rows:
        logps = [plain_logp(policy, response) for response in row["responses"]]
        with torch.no_grad():
            before = [plain_logp(reference, response) for response in row["responses"]]
        chosen, rejected = [0.1 * (logp - ref) for logp, ref in zip(logps, before)]
        losses.append(-logsigmoid(chosen - rejected))
        logged.append({"rewards/chosen": chosen, "rewards/rejected": rejected,
                       "rewards/margins": chosen - rejected, "logps/chosen": logps[0],
                       "logps/rejected": logps[1], "rewards/accuracies": chosen > rejected})
    return sum(losses) / len(rows), {
        name: sum(row[name].item() for row in logged) / len(rows) for name in logged[0]}


def update(optim, weight, moments, number, lr):
    """AdamW without decay and RMSprop, as their papers and torch's defaults have them."""
    m, v = moments.setdefault(weight, [0, 0])
    gradient = weight.grad
    if optim == "rmsprop":
        v = 0.99 * v + 0.01 * gradient ** 2
        change = gradient / (v.sqrt() + 1e-8)
    else:
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient ** 2
        change = m / (1 - 0.9 ** (number + 1)) / ((v / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8)
    moments[weight] = [m, v]
    with torch.no_grad():
        weight -= lr * change
    weight.grad = None


RATES = {"linear": [0.5, 1, 0.75, 0.5, 0.25], "constant": [0.5, 1, 1, 1, 1],  # of 5 steps
         "cosine": [0.5, 1, 0.5 + 0.125 ** 0.5, 0.5, 0.5 - 0.125 ** 0.5]}  # cos 45 = 1/2 ** 0.5


@pytest.mark.parametrize("loss, rows, microbatch, optim, schedule", [
    ("dpo", TOY, 32, "adamw", "linear"), ("dpo", UNEVEN, 2, "adamw", "cosine"),
    ("dpo", TOY, 2, "rmsprop", "constant"), ("sft", TARGETS, 32, "rmsprop", "cosine"),
    ("sft", TARGETS, 2, "adamw", "linear")])
def test_updates_match_a_plain_loop(loss, rows, microbatch, optim, schedule, tiny_model, tmp_path):
    """Five steps against losses and updates spelled out: no sharing, padding, pieces or chunks."""
    ours, plain, reference = (load(tiny_model)[0].double() for _ in range(3))
    tokenizer = load(tiny_model)[1]
    args = settings(loss=loss, microbatch=microbatch, clip=0.5, optim=optim, schedule=schedule,
                    warmup=0.2)
    steps = train.plan(encoded(tokenizer, rows), args, 3, 3)[:5]
    known = reference_of(tmp_path, ours, steps, args) if loss == "dpo" else {}
    log = loop(tmp_path, ours, steps, known, args)

    moments, norms = {}, []
    for number, row in enumerate(log):
        mean, right = plain_loss(loss, plain, reference, steps[number])
        mean.backward()
        norms.append(torch.stack([w.grad.norm() for w in plain.parameters()]).norm().item())
        for weight in plain.parameters():
            weight.grad *= min(1, 0.5 / (norms[-1] + 1e-6))
            update(optim, weight, moments, number, 1e-3 * RATES[schedule][number])
        right |= {"step": number, "epoch": round(number / 5, 4), "loss": mean.item(),
                  "learning_rate": 1e-3 * RATES[schedule][number], "grad_norm": norms[-1]}
        assert row == pytest.approx(right, rel=1e-7, abs=1e-7)
    assert number == 4 and max(norms) > 0.5
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        assert (a - b).abs().max() < 1e-6, name


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is here")
def test_a_missing_library_is_named(tiny_model, tmp_path):
    """At once, not when the reference's log-probs have been computed."""
    done = run_train(tmp_path, tiny_model, "--optim", "adamw8bit", held=None)
    assert done.returncode == 2 and "bitsandbytes" in done.stderr
    assert names(tmp_path) == {"prefs.jsonl"}


def small_run(tiny_model, tmp_path):
    """What `train` takes, of two pairs: (model, steps, reference)."""
    model, tokenizer = load(tiny_model)
    steps = train.plan(encoded(tokenizer, TOY[:2]), settings(), 8, 1)
    return model, steps, reference_of(tmp_path, model, steps, settings())


def test_nan_stops_with_the_rows_of_its_step(tiny_model, tmp_path):
    model, steps, reference = small_run(tiny_model, tmp_path)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(SystemExit, match="nan.*land0>0, land0>1"):
        loop(tmp_path, model, steps, reference, settings())
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_another_reference_is_noticed_at_step_0(tiny_model, tmp_path):
    model, steps, reference = small_run(tiny_model, tmp_path)
    reference[steps[0][0]["responses"][0]] += 3.0
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(SystemExit, match="not the reference"):
        loop(tmp_path, model, steps, reference, settings())
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("refused, kind, config, change", [
    (False, GraniteForCausalLM, GraniteConfig, {"logits_scaling": 1.0}),
    (True, GraniteForCausalLM, GraniteConfig, {"logits_scaling": 2.0}),
    (False, Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": None, "head_dim": 8}),
    (False, Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 0.1, "head_dim": 8})])
def test_a_head_that_does_more_is_refused(refused, kind, config, change, tiny_model, tmp_path):
    _, tokenizer = load(tiny_model)
    torch.manual_seed(0)
    kind(config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
                initializer_range=0.5, **change)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = run_train(tmp_path, tmp_path / "model", "--full", rows=TOY[:2], held=None)
    assert done.returncode == 2 * refused, done.stderr
    assert ("a scaled head" in done.stderr) == refused
    assert (tmp_path / "tuned").exists() == (not refused)
    assert not list(tmp_path.glob("*.tmp*"))


# ---------------------------------------------------------------------------------------------
# The command

def test_it_learns_a_toy_preference_and_says_so(tiny_model, tmp_path):
    done = run_train(tmp_path, tiny_model, "--full", "--epochs", 6, "--batch", 6)
    assert done.returncode == 0, done.stderr
    log = read_rows(tmp_path / "tuned" / "log.jsonl")
    before, steps, after = log[0], log[1:-1], log[-1]
    assert abs(steps[0]["loss"] - math.log(2)) < 1e-6 and steps[0]["rewards/margins"] == 0
    assert abs(before["eval_loss"] - math.log(2)) < 1e-6
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"] and steps[-1]["rewards/accuracies"] == 1
    assert after["eval_rewards/accuracies"] > 0.5 and after["eval_loss"] < before["eval_loss"]
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert "0.6931 where policy is reference" in done.stdout and "held-out" in done.stdout

    # what was saved is a bf16 model that prefers "yes", with the tokenizer and chat template
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    tuned, tokenizer = load(tmp_path / "tuned")
    assert margin(tuned, tokenizer) > margin(*load(tiny_model)) + 5
    card = (tmp_path / "tuned" / "README.md").read_text(encoding="utf-8")
    assert "--epochs 6" in card and "sha256" in card


def margin(model, tokenizer):
    """By how many nats the model prefers "yes yes." for a prompt it was not trained on."""
    row, = encoded(tokenizer, [pair("atoll")])
    with torch.no_grad():
        chosen, rejected = [plain_logp(model.float(), response) for response in row["responses"]]
    return (chosen - rejected).item()


def test_an_adapter_is_one_for_everybody(tiny_model, tmp_path):
    """LoRA, the default: what peft itself loads, weights of the adapter only, ln 2 at step 0."""
    done = run_train(tmp_path, tiny_model, "--epochs", 4, "--batch", 4, "--lora-r", 4)
    assert done.returncode == 0, done.stderr
    out, log = tmp_path / "tuned", read_rows(tmp_path / "tuned" / "log.jsonl")
    assert log[0]["eval_loss"] == log[1]["loss"] == torch.tensor(2.0).log().item()
    assert log[1]["rewards/margins"] == log[1]["rewards/chosen"] == 0
    assert log[-1]["eval_loss"] < log[0]["eval_loss"]

    weights = load_file(out / "adapter_model.safetensors")
    kinds = {name.rsplit(".", 2)[1]: weight.dtype for name, weight in weights.items()}
    assert kinds == {"lora_A": torch.float32, "lora_B": torch.float32}
    assert len(weights) == 2 * 7 * 2  # A and B of the 7 linear layers in each of 2 blocks: no head
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 32 and config["lora_dropout"] == 0
    assert not config["modules_to_save"] and not (out / "model.safetensors").exists()

    base, tokenizer = load(tiny_model)
    without = margin(base, tokenizer)
    ours, *_ = load_model(str(tiny_model), adapter=str(out), dtype="float32", device="cpu")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), out)
    assert margin(plain, tokenizer) > without + 1
    assert margin(ours, tokenizer) == pytest.approx(margin(plain, tokenizer))
    with plain.disable_adapter():
        assert margin(plain, tokenizer) == pytest.approx(without)


def test_base_weights_stay_as_they_are(tiny_model, tmp_path):
    args = settings(model=str(tiny_model), microbatch=2)
    model, tokenizer = train.policy_of(args, "cpu")
    steps = train.plan(encoded(tokenizer, UNEVEN), args, 3, 1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    reference = reference_of(tmp_path, model, steps, args)
    log = loop(tmp_path, model, steps, reference, args)
    assert log[0]["rewards/margins"] == 0 and log[-1]["rewards/margins"] != 0
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert changed == {name for name in before if "lora_" in name} and len(changed) == 28


def test_sft_learns_its_targets(tiny_model, tmp_path):
    held = [target("isle", "yes")]
    done = run_train(tmp_path, tiny_model, "--full", "--loss", "sft", "--epochs", 4, "--batch", 4,
                     rows=TARGETS, held=held)
    assert done.returncode == 0, done.stderr
    log = read_rows(tmp_path / "tuned" / "log.jsonl")
    assert all(set(row) == {"step", "epoch", "learning_rate", "loss", "grad_norm", "tokens"}
               for row in log[1:-1])
    _, tokenizer = load(tiny_model)
    lengths = {row["id"]: len(row["responses"][0][1])
               for row in encoded(tokenizer, TARGETS)}
    assert lengths["a/0"] == len("yes") + 1 and lengths["a/1"] == len("yes, it is")
    assert sum(row["tokens"] for row in log[1:-1]) == 4 * sum(lengths.values())
    for row, folder in ((log[0], tiny_model), (log[-1], tmp_path / "tuned")):
        model, _ = load(folder)  # saved in bf16: the last figure is not so sharp
        response, = encoded(tokenizer, held)[0]["responses"]
        assert row["eval_loss"] == pytest.approx(-plain_logp(model, response).item() / 4, rel=2e-2)
    assert log[-1]["eval_loss"] < log[0]["eval_loss"] - 0.2
    assert not list(tmp_path.glob("reference-*"))


def test_two_runs_are_bit_equal_and_a_finished_one_is_left_alone(tiny_model, tmp_path):
    for name in ("one", "two"):
        assert run_train(tmp_path / name, tiny_model, "--full").returncode == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert bytes_of(one / "tuned") == bytes_of(two / "tuned") and len(bytes_of(one / "tuned")) == 2
    before = reliability.snapshot(one / "tuned")
    again = run_train(one, tiny_model, "--full")
    assert again.returncode == 0 and "finished" in again.stdout
    for flags, rows, said in [
            (["--full", "--beta", 0.2], TOY, "--beta 0.1 -> 0.2"),
            ([], TOY, "--full True -> False"),
            (["--full"], [*TOY, pair("new")], "--rows 16 -> 17"),
            (["--full"], [*TOY[1:], pair("new")], "other rows")]:
        done = run_train(one, tiny_model, *flags, rows=rows)
        assert done.returncode == 2 and said in done.stderr
    assert reliability.snapshot(one / "tuned") == before
    assert run_train(one, tiny_model, "--full", "--beta", 0.2, "--overwrite").returncode == 0
    assert bytes_of(one / "tuned") != bytes_of(two / "tuned")
    assert not list(tmp_path.rglob("*.tmp*")) + list(tmp_path.rglob("step-*"))


@pytest.mark.parametrize("name", ["thesis.tex", "chapters/one.tex", "README.md"])
def test_a_folder_of_somebody_else_is_never_replaced(name, tiny_model, tmp_path):
    theirs = tmp_path / "tuned" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("x")
    (tmp_path / "tuned" / "log.jsonl").write_text("")
    for flags in ([], ["--overwrite"]):
        done = run_train(tmp_path, tiny_model, *flags)
        assert done.returncode == 2 and "tuned is there" in done.stderr
        assert reliability.snapshot(tmp_path / "tuned") == {
            theirs: b"x", tmp_path / "tuned" / "log.jsonl": b""}
        assert not list(tmp_path.glob("*.args.json*")) + list(tmp_path.glob("reference-*"))


def test_out_in_a_new_folder_and_with_a_slash(tiny_model, tmp_path):
    """`runs/new/tuned/`, twice: nothing is lost, nothing is left lying about."""
    for _ in range(2):
        done = run_train(tmp_path, tiny_model, "--overwrite", out=f"{tmp_path}/new/tuned/")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "new" / "tuned" / "adapter_model.safetensors").exists()
        left = {name for name in names(tmp_path / "new") if "reference-" not in name}
        assert left == {"tuned", "tuned.args.json"}


def test_overwrite_takes_nothing_from_the_run_before(tiny_model, tmp_path):
    """Not its weights, when it was killed in the final save, and not its checkpoints."""
    with stopped_at(train.shlex, "join"):  # all is there but the model card
        run_train(tmp_path, tiny_model, "--full", "--save-every", 1, "--batch", 4)
    assert {"model.safetensors", "step-0000004.pt"} < names(tmp_path / "tuned")
    assert "README.md" not in names(tmp_path / "tuned")
    assert run_train(tmp_path, tiny_model, "--overwrite").returncode == 0
    assert run_train(tmp_path, tiny_model, out="fresh").returncode == 0
    assert bytes_of(tmp_path / "tuned") == bytes_of(tmp_path / "fresh")
    assert names(tmp_path / "tuned") == names(tmp_path / "fresh")


def test_overwrite_killed_before_any_removal(tiny_model, tmp_path):
    """What is left is no finished run, of neither flags, and gets nothing into the next one."""
    new = ["--beta", 0.2]
    assert run_train(tmp_path, tiny_model, *new, out="fresh").returncode == 0
    assert run_train(tmp_path, tiny_model, "--full", "--save-every", 1).returncode == 0
    old = shutil.copytree(tmp_path / "tuned", tmp_path / "old")
    (old / "step-0000001.pt").write_bytes(b"of a kill in the last removals")
    memo, real = tmp_path / "tuned.args.json", os.unlink
    memo_of_old, there = memo.read_bytes(), len(names(old))
    for removals in range(99):
        shutil.rmtree(tmp_path / "tuned")
        shutil.copytree(old, tmp_path / "tuned")
        memo.write_bytes(memo_of_old)
        left = iter(range(removals))

        def unlink(path, *rest, **more):
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(path, *rest, **more)

        with mock.patch.object(os, "unlink", unlink), suppress(KeyboardInterrupt):
            run_train(tmp_path, tiny_model, *new, "--overwrite")
            break
        done = run_train(tmp_path, tiny_model, *new)
        if done.returncode == 2:
            assert "other flags" in done.stderr
        else:
            assert bytes_of(tmp_path / "tuned") == bytes_of(tmp_path / "fresh"), removals
            assert names(tmp_path / "tuned") == names(tmp_path / "fresh"), removals
    assert 98 > removals >= there - 1  # all that was there, but for log.jsonl, which is cut


@pytest.mark.parametrize("hands", ["reference_logps", "lock", "write_whole", "train"])
def test_killed_at_birth(hands, tiny_model, tmp_path):
    """The same command takes up an OUT that is not there yet, or has an empty log.jsonl."""
    assert run_train(tmp_path / "whole", tiny_model).returncode == 0
    with stopped_at(train, hands):
        run_train(tmp_path, tiny_model)
    assert (tmp_path / "tuned").exists() <= (tmp_path / "tuned.args.json").exists()
    assert all(not held for held in reliability.snapshot(tmp_path / "tuned").values())
    done = run_train(tmp_path, tiny_model)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "tuned") == bytes_of(tmp_path / "whole" / "tuned")
    assert names(tmp_path / "tuned") == names(tmp_path / "whole" / "tuned")


def carded(folder):
    """Whether 05 says that it is done; peft has a README.md, too."""
    card = folder / "README.md"
    return card.exists() and "sha256" in card.read_text(encoding="utf-8")


@pytest.mark.parametrize("flags, where, what", [
    (["--full"], transformers.modeling_utils, "safe_save_file"),
    (["--full"], PreTrainedTokenizerFast, "save_pretrained"),
    ([], peft.peft_model, "safe_save_file"), ([], PreTrainedTokenizerFast, "save_pretrained"),
    ([], train.shlex, "join"), ([], train, "sweep")])
def test_killed_in_the_final_save(flags, where, what, tiny_model, tmp_path):
    """README.md says that OUT is whole: without it, the same command ends with the same OUT; with
    it, nothing is missing and no checkpoint left."""
    flags = [*flags, "--save-every", 1]
    assert run_train(tmp_path / "whole", tiny_model, *flags).returncode == 0
    real = train.sweep
    with stopped_at(where, what):
        if what == "sweep":  # the one after the model card
            train.sweep.side_effect = lambda *given, **more: (
                real(*given, **more) if more or given[1:] else
                (_ for _ in ()).throw(KeyboardInterrupt))
        run_train(tmp_path, tiny_model, *flags)
    assert list((tmp_path / "tuned").glob("*.json")) or what != "sweep"
    assert run_train(tmp_path, tiny_model, *flags).returncode == 0
    assert bytes_of(tmp_path / "tuned") == bytes_of(tmp_path / "whole" / "tuned")
    assert names(tmp_path / "tuned") == names(tmp_path / "whole" / "tuned")
    assert carded(tmp_path / "tuned")


def test_flags_of_a_checkpoint_are_its_own(tiny_model, tmp_path):
    """An --overwrite that died right after its args.json does not inherit older checkpoints."""
    flags = ["--save-every", 1, "--batch", 4]
    interrupt(tmp_path, tiny_model, *flags, at=2)
    memo = tmp_path / "tuned.args.json"
    memo.write_text(memo.read_text().replace('"beta": 0.1', '"beta": 0.2'))
    done = run_train(tmp_path, tiny_model, *flags, "--beta", 0.2)
    assert done.returncode == 2 and "begun from another model, flags" in done.stderr


def test_what_has_learnt_nothing_may_begin_anew(tiny_model, tmp_path):
    """Stopped (out of memory, say) before the first checkpoint, it takes other flags; behind one,
    it does not."""
    flags = ["--save-every", 2, "--batch", 4]
    interrupt(tmp_path, tiny_model, *flags, at=1)
    interrupt(tmp_path, tiny_model, *flags, "--microbatch", 2, at=3)
    done = run_train(tmp_path, tiny_model, *flags)
    assert done.returncode == 2 and "--microbatch 2 -> 64" in done.stderr
    assert run_train(tmp_path, tiny_model, *flags, "--microbatch", 2).returncode == 0
    run_train(tmp_path / "whole", tiny_model, *flags, "--microbatch", 2)
    assert bytes_of(tmp_path / "tuned") == bytes_of(tmp_path / "whole" / "tuned")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_weights_are_saved_as_they_are_computed_with(dtype, tiny_model, tmp_path):
    done = run_train(tmp_path, tiny_model, "--full", "--dtype", dtype, rows=TOY[:2], held=None)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "tuned" / "model.safetensors").values()
    assert {str(weight.dtype) for weight in weights} == {f"torch.{dtype}"}


GONE = "field is not there"
SENTENCES = {"sentence_label": [True, False], "completion_sentences": ["It is.", "So."],
             "sentence_spans": [[0, 6], [7, 10]]}


@pytest.mark.parametrize("loss, change, named", [
    *[("dpo", change, named) for change, named in [
        ({"chosen": []}, "'chosen'"), ({"chosen": "x"}, "'chosen'"),
        ({"chosen": said("x") * 2}, "'chosen'"), ({"chosen": GONE}, "'chosen'"),
        ({"rejected": [{"role": "assistant"}]}, "'rejected'"), ({"rejected": ["x"]}, "'rejected'"),
        ({"rejected": said(3)}, "'rejected'"), ({"rejected": None}, "'rejected'"),
        ({"finish": {"chosen": "eos"}}, "'finish'"), ({"finish": "eos"}, "'finish'"),
        ({"finish": None}, "'finish'"), ({"finish": ["stop"]}, "'finish'"),
        ({"prompt": 3}, "'prompt'"), ({"prompt": GONE}, "'prompt'"), ({"prompt": [3]}, "'prompt'"),
        ({"prompt": [{"role": "user"}]}, "'prompt'"), ({"prompt_id": [3]}, "'prompt_id'"),
        ({"kind": [3]}, "'kind'"), ({"id": 3}, "'id'")]],
    *[("sft", change, named) for change, named in [
        ({"completion": GONE}, "'completion'"), ({"completion": "x"}, "'completion'"),
        ({"completion": said(None)}, "'completion'"), ({"completion": []}, "'completion'"),
        ({"finish": "eos"}, "'finish'")]],
    *[(loss, {"label": label}, "'label'") for loss in ("kto", "factalign")
      for label in (GONE, None, 1, "true")],
    *[("factalign", SENTENCES | change, named) for change, named in [
        ({"sentence_label": [True, 1]}, "'sentence_label'"),
        ({"sentence_label": [True, None]}, "'sentence_label'"),
        ({"sentence_label": True}, "'sentence_label'"),
        ({"sentence_label": "yes"}, "'sentence_label'"),
        ({"sentence_label": [True]}, "'sentence_label'"),
        ({"completion_sentences": ["It is."]}, "'completion_sentences'"),
        ({"completion_sentences": GONE, "sentence_spans": GONE}, "'completion_sentences'"),
        ({"completion_sentences": 2}, "'completion_sentences'"),
        ({"completion_sentences": ["It is.", 3], "sentence_spans": GONE}, "'completion_sentences'"),
        ({"sentence_spans": [[0, 6], [7, 10], [10, 11]]}, "'sentence_spans'"),
        ({"sentence_spans": [[0, 6], [7]]}, "'sentence_spans'"),
        ({"sentence_spans": [0, 6]}, "'sentence_spans'"),
        ({"sentence_spans": [[0, 6], [-9, -1]]}, "'sentence_spans'"),
        ({"sentence_spans": [[0, 4], [3, 7]]}, "'sentence_spans'"),
        ({"sentence_spans": [[4, 7], [0, 3]]}, "'sentence_spans'"),
        ({"sentence_spans": [[0, 3], [4, 900]]}, "'sentence_spans'"),
        ({"sentence_spans": [[0, 3], [4, 4]]}, "'sentence_spans'"),
        ({"sentence_spans": [[0, 6], ["7", "10"]]}, "'sentence_spans'")]],
])
def test_bad_rows_are_refused(loss, change, named, tiny_model, tmp_path):
    good = pair if loss == "dpo" else target
    rows = [{**good(name), **({} if loss in ("dpo", "sft") else {"label": True})} for name in "ab"]
    rows[1] = {field: value for field, value in {**rows[1], **change}.items() if value is not GONE}
    done = run_train(tmp_path, tiny_model, "--loss", loss, rows=rows, held=None)
    assert done.returncode == 2, done.stderr
    where = re.escape(str(tmp_path / "prefs.jsonl"))
    told = re.fullmatch(f"{where}:2: expected (.*), found .+\n", done.stderr)
    assert told and named in told[1], done.stderr
    assert names(tmp_path) == {"prefs.jsonl"}


@pytest.mark.parametrize("flags, named", [
    (["--lam", -3], "--lam"), (["--sentence-beta", -1], "above 0"),
    (["--undesirable-weight", 0], "above 0"), (["--adapter", "nowhere"], "adapter_config.json"),
    (["--model", "ADAPTER"], "its base as --model"),
    (["--kind-weights", "fact=2"], "fact"), (["--loss", "factalign"], "with sentences")])
def test_flags_that_cannot_be_meant_are_refused(flags, named, tiny_model, tmp_path):
    rows = [{**target(name), "label": n % 2 == 0} for n, name in enumerate("abcd")]
    (adapter := tmp_path / "adapter").mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    flags = [adapter if flag == "ADAPTER" else flag for flag in flags]
    done = run_train(tmp_path / "x", tiny_model, "--loss", "kto", *flags, rows=rows, held=None)
    assert done.returncode == 2 and named in done.stderr
    assert names(tmp_path / "x") == {"prefs.jsonl"}


def test_advice_on_weights_is_for_kto(tiny_model, tmp_path):
    """Three good rows and a bad one: weights are advised for a loss that has some."""
    rows = [{**target(name), "label": n > 0} for n, name in enumerate("abcd")]
    for loss, flags, advised in [("sft", [], 0), ("kto", [], 1),
                                 ("kto", ["--undesirable-weight", 3], 0)]:
        done = run_train(tmp_path / f"{loss}{len(flags)}", tiny_model, "--loss", loss, *flags,
                         rows=rows, held=None)
        assert done.returncode == 0 and done.stderr.count("weight x count") == advised, done.stderr


def test_kto_has_no_step_of_one_row(tiny_model, tmp_path):
    rows = [{**target(name), "label": n % 2 == 0} for n, name in enumerate("abcdefg")]
    done = run_train(tmp_path, tiny_model, "--loss", "kto", "--batch", 2, rows=rows, held=None)
    assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "tuned" / "log.jsonl")) == 3  # of 3, 2 and 2


def test_rows_of_another_loss_are_refused(tiny_model, tmp_path):
    for flags, rows in ((["--loss", "sft"], TOY), ([], TARGETS)):
        done = run_train(tmp_path, tiny_model, *flags, rows=rows, held=None)
        assert done.returncode == 2 and "prefs.jsonl:1: expected" in done.stderr
        assert names(tmp_path) == {"prefs.jsonl"}


def test_prompts_on_both_sides_are_refused(tiny_model, tmp_path):
    done = run_train(tmp_path, tiny_model, held=[pair("land3")])
    assert done.returncode == 2 and "land3" in done.stderr and not (tmp_path / "tuned").exists()


# ---------------------------------------------------------------------------------------------
# The reference's cache

def other_weights(model, folder):
    """The model with one more weight changed, in another folder."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_reference_is_computed_once(tiny_model, tmp_path):
    """Once for all runs in a folder that begin alike, whatever the rate; and anew where they don't:
    other weights, dtype, rows, held-out rows, microbatches."""
    def run(*flags, model=tiny_model, folder="x", rows=TOY[:4], held=HELD[:1], **kwargs):
        done = run_train(tmp_path / folder, model, *flags, rows=rows, held=held, **kwargs)
        assert done.returncode == 0, done.stderr
        found = (tmp_path / folder).glob("reference-*.safetensors")
        return {path: path.stat().st_mtime_ns for path in found}

    first = run(out="a")
    assert len(first) == 1
    assert run("--lr", 2e-3, "--beta", 0.3, out="b") == first
    run("--lr", 2e-3, "--beta", 0.3, out="b", folder="y")  # there it finds nothing
    assert bytes_of(tmp_path / "x" / "b") == bytes_of(tmp_path / "y" / "b")
    changed = other_weights(tiny_model, tmp_path / "model")
    for n, kwargs in enumerate([
            {"model": changed}, {"rows": [*TOY[:3], pair("land1", n=1)]}, {"held": HELD[1:2]}]):
        assert len(run(out=f"c{n}", **kwargs)) == 2 + n
    for n, flags in enumerate([["--full"], ["--full", "--dtype", "float32"],
                               ["--microbatch", 1], ["--microbatch", 2]]):
        assert len(run(*flags, out=f"d{n}")) == 5 + n  # the last two are batched alike
    assert first.items() <= run(out="e").items()


def test_the_reference_of_a_response_is_that_of_its_first_batch(tiny_model, tmp_path, monkeypatch):
    """There the policy sees the same batch, so that step 0 is ln 2 and not the rounding of two."""
    model, tokenizer = load(tiny_model)
    again = [{**pair("a", "yes", text, 9 + n), "prompt_id": f"a{n}", "id": f"a{n}"}
             for n, text in enumerate(["no", "so", "nono"])]  # the same prompt under other names
    steps = train.plan(encoded(tokenizer, UNEVEN + again), settings(), 3, 4)
    batches = [train.distinct(rows) for rows in steps]

    def numbered(model, responses, args):
        number = float(batches.index(responses))
        return {response: torch.full((len(response[1]),), number) for response in responses}

    monkeypatch.setattr(train, "completion_logps", numbered)
    for response, logps in reference_of(tmp_path, model, steps, settings()).items():
        first = next(n for n, batch in enumerate(batches) if response in batch)
        assert logps.tolist() == [first] * len(response[1])


def test_the_reference_is_read_from_its_cache(tiny_model, tmp_path):
    """A file that says something else is believed, and then noticed at step 0."""
    assert run_train(tmp_path, tiny_model, out="a").returncode == 0
    path, = tmp_path.glob("reference-*")
    save_file({"logps": 3 * load_file(path)["logps"]}, path)
    done = run_train(tmp_path, tiny_model, out="b")
    assert done.returncode == 1 and "not the reference" in done.stderr
    assert names(tmp_path / "b") == {"log.jsonl"}
    path.unlink()  # then it is computed, and the same command goes on
    assert run_train(tmp_path, tiny_model, out="b").returncode == 0
    assert bytes_of(tmp_path / "b") == bytes_of(tmp_path / "a")


# ---------------------------------------------------------------------------------------------
# Checkpoints and kills

def interrupt(folder, *args, at, **kwargs):
    """Ctrl-C before the update of step `at`."""
    real = train.rate
    hands = mock.Mock(side_effect=lambda step, *rest: real(step, *rest) if step < at else
                      (_ for _ in ()).throw(KeyboardInterrupt))
    with mock.patch.object(train, "rate", hands), pytest.raises(KeyboardInterrupt):
        run_train(folder, *args, **kwargs)


def stopped_at(where, what):
    """Ctrl-C at the first call of where.what."""
    stack = ExitStack()
    stack.enter_context(pytest.raises(KeyboardInterrupt))
    stack.enter_context(mock.patch.object(where, what, mock.Mock(side_effect=KeyboardInterrupt)))
    return stack


def test_evaluated_before_between_and_after(tiny_model, tmp_path):
    flags = ["--epochs", 2, "--batch", 4, "--save-every", 2, "--eval-every", 3]
    assert run_train(tmp_path / "whole", tiny_model, *flags).returncode == 0
    log = read_rows(tmp_path / "whole" / "tuned" / "log.jsonl")
    assert [row["step"] for row in log if "loss" in row] == list(range(8))
    assert [row["step"] for row in log if "eval_loss" in row] == [0, 3, 6, 8]
    assert [row["step"] for row in log] == [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8]
    # interrupted right before and after checkpoints and evaluations: no row twice, none lost
    for at in (1, 3, 4, 6, 7):
        interrupt(tmp_path / "again", tiny_model, *flags, at=at)
        steps = [path.name for path in (tmp_path / "again").glob("tuned/step-*")]
        assert sorted(steps) == [f"step-{n:07d}.pt" for n in range(2, at + 1, 2)][-2:]
    assert run_train(tmp_path / "again", tiny_model, *flags).returncode == 0
    assert bytes_of(tmp_path / "again" / "tuned") == bytes_of(tmp_path / "whole" / "tuned")
    assert names(tmp_path / "again" / "tuned") == names(tmp_path / "whole" / "tuned")


def test_a_checkpoint_of_another_model_is_refused(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    flags = ["--full", "--save-every", 1, "--batch", 4]
    interrupt(tmp_path, model, *flags, at=2)
    before = reliability.snapshot(tmp_path / "tuned")
    other_weights(tiny_model, model)
    done = run_train(tmp_path, model, *flags)
    assert done.returncode == 2 and "begun from another model" in done.stderr
    shutil.copytree(tiny_model, model, dirs_exist_ok=True)
    done = run_train(tmp_path, model, *flags, held=HELD[1:])
    assert done.returncode == 2 and "--held" in done.stderr
    assert reliability.snapshot(tmp_path / "tuned") == before
    assert run_train(tmp_path, model, *flags).returncode == 0


def pounce(pid, there):
    """kill -9 a run while there() holds: stop it first, then look again, as it may just have
    gone on. False where the run ended before."""
    assert pid > 1  # 0 would be this process group: an exit code that a failed test left unread
    try:
        while True:
            while not there():
                os.kill(pid, 0)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.01)
            if there():
                os.kill(pid, signal.SIGKILL)
                return True
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return False


LONG = ["--epochs", 4, "--batch", 4, "--save-every", 2, "--eval-every", 3]  # 16 steps


@pytest.mark.parametrize("flags", [["--full", *LONG], LONG], ids=["full", "lora"])
def test_kill(flags, tiny_model, launcher, tmp_path):
    """kill -9 inside the writing of a checkpoint, between two, in the final save; the same command
    again ends with the same weights and the same log, to the bit."""
    reliability.start(launcher, command(tmp_path / "whole", tiny_model, *flags))
    assert reliability.finish(launcher) == 0
    whole = bytes_of(tmp_path / "whole" / "tuned")
    assert len(whole) == 2
    argv = command(tmp_path / "killed", tiny_model, *flags)
    out = tmp_path / "killed" / "tuned"

    def rows():
        log = out / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def checkpoint(least):
        return max(out.glob("step-*.pt"), default=out).stem >= f"step-{least:07d}"

    moments = [lambda: (out / "new").exists() and checkpoint(2),
               lambda: (out / "new").exists() and checkpoint(6),
               lambda: rows() >= 14 and not (out / "new").exists() and not carded(out),
               lambda: not carded(out) and any(path.name.endswith((".json", "model.safetensors"))
                                               for path in out.glob("*"))]
    for there in moments:
        for _ in range(5):
            caught = pounce(reliability.start(launcher, argv), there)
            assert reliability.finish(launcher) == (-signal.SIGKILL if caught else 0)
            if caught:
                break
            shutil.rmtree(out)  # this machine was too busy to see it in time: once more
        assert there() and not carded(out)
    reliability.start(launcher, argv)
    assert reliability.finish(launcher) == 0
    assert bytes_of(out) == whole
    assert names(out) == names(tmp_path / "whole" / "tuned") and carded(out)
    assert not {"new", "README.md.tmp"} & names(out) and not list(out.glob("step-*"))
    assert names(out.parent) == names(tmp_path / "whole")


def test_a_second_process_is_refused(tiny_model, launcher, tmp_path):
    """It changes nothing, whatever it was told: not the flags that the first will answer for."""
    argv = command(tmp_path, tiny_model, *LONG)
    out, memo = tmp_path / "tuned", tmp_path / "tuned.args.json"
    pid = reliability.start(launcher, argv)
    assert pid > 1
    try:
        while not (out / "log.jsonl").exists() or not (out / "log.jsonl").stat().st_size:
            os.kill(pid, 0)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.01)
        before = reliability.snapshot(out), memo.read_bytes()
        for flags in ([], ["--overwrite"], ["--overwrite", "--beta", 0.2, "--full"]):
            done = run_train(tmp_path, tiny_model, *LONG, *flags)
            assert done.returncode == 2 and "another process" in done.stderr
            assert (reliability.snapshot(out), memo.read_bytes()) == before
    finally:
        os.kill(pid, signal.SIGCONT)
        code = reliability.finish(launcher)
    assert code == 0
    steps = [row["step"] for row in read_rows(out / "log.jsonl") if "loss" in row]
    assert steps == list(range(16))
    assert json.loads(memo.read_text()) == {**json.loads(before[1]), "finished": True}
