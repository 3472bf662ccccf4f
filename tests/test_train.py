"""05_train.py: rows, the plan, log-probs and updates against a plain loop written apart, LoRA, the
reference's cache, kills. In this process where that will do; NANOFACT_CHAOS=1 kills 20 times more.
"""
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from types import SimpleNamespace
from unittest import mock

import pytest
import test_reliability as reliability
import torch
from common import load_model
from conftest import read_rows, stage, write_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig,
                          GraniteForCausalLM)

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
    """The flags that the functions of the loop read; fp64 weights make the right answer sharp."""
    return SimpleNamespace(**{
        "loss": "dpo", "dtype": "float32", "lr": 1e-3, "beta": 0.1, "clip": 1.0, "warmup": 0.0,
        "epochs": 1, "microbatch": 32, "save_every": 0, "eval_every": 0, **changes})


def loop(folder, model, steps, reference, args):
    """`train` with its log in `folder`; the rows of the log."""
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        train.train(model, steps, [], reference, args, "key", log)
    return read_rows(folder / "log.jsonl")


def reference_of(folder, model, steps, args):
    args.out = folder / "tuned"
    return train.reference_logps(model, steps, args, "key")


def load(folder):
    return load_model(str(folder), dtype="float32", device="cpu")[:2]


def encoded(tokenizer, tmp_path, rows, max_length=1024):
    loss = "sft" if "completion" in rows[0] else "dpo"
    read = train.read_rows(write_rows(tmp_path / "rows.jsonl", rows), loss)
    return train.encode_rows(tokenizer, read, max_length)


def plain_logp(model, response):
    """One response at a time, the whole sequence through the whole model."""
    prompt, completion = response
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids).logits.log_softmax(-1)[0]
    return sum(logps[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1]))


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


def test_long_rows_are_left_out_whole(tiny_model, tmp_path):
    _, tokenizer = load(tiny_model)
    rows = [pair("a"), pair("b", chosen="x" * 300), pair("c", rejected="x" * 300)]
    whole = encoded(tokenizer, tmp_path, rows)
    assert [row["id"] for row in whole] == ["a>0", "b>0", "c>0"]
    assert encoded(tokenizer, tmp_path, rows, 200) == whole[:1]
    longest = max(len(prompt) + len(completion) for prompt, completion in whole[0]["responses"])
    assert len(encoded(tokenizer, tmp_path, rows[:1], longest)) == 1
    assert len(encoded(tokenizer, tmp_path, rows[:1], longest - 1)) == 0
    rows = [target("a"), target("b", "", "length")]  # not one token to train on
    assert [row["prompt_id"] for row in encoded(tokenizer, tmp_path, rows)] == ["a"]


def test_rows_of_others_are_whole(tmp_path):
    """TRL's pairs and completions say no finish; 04's targets do, and more."""
    row = pair("a")
    del row["finish"], row["prompt_id"]
    read, = train.read_rows(write_rows(tmp_path / "rows.jsonl", [row]), "dpo")
    assert read["texts"] == [("yes yes.", "stop"), ("no no.", "stop")]
    assert read["prompt_id"] == json.dumps(row["prompt"])
    row["finish"] = {"rejected": "length"}  # says nothing of the other
    read, = train.read_rows(write_rows(tmp_path / "rows.jsonl", [row]), "dpo")
    assert read["texts"] == [("yes yes.", "stop"), ("no no.", "length")]
    rows = [{"prompt": row["prompt"], "completion": said("so.")},
            {"prompt": "Who?", "completion": said("so.")},
            {**target("b", "it", "length"), "score": 0.5, "kind": "fact", "topic": "B"}]
    read = train.read_rows(write_rows(tmp_path / "rows.jsonl", rows), "sft")
    assert [r["texts"] for r in read] == [[("so.", "stop")]] * 2 + [[("it", "length")]]
    assert read[1]["prompt"] == [{"role": "user", "content": "Who?"}]
    assert [r["prompt_id"] for r in read][::2] == [json.dumps(row["prompt"]), "b"]
    assert len(train.read_rows(tmp_path / "rows.jsonl", "sft", limit=2)) == 2


# ---------------------------------------------------------------------------------------------
# The plan

def lengths_to_plan(*groups):
    """Rows as `plan` takes them: of each group n pairs, which share their first response."""
    return [{"id": f"{g}/{n}", "prompt_id": g, "responses": [((g,), (0,)), ((g,), (1,) * (n + 1))]}
            for g, size in enumerate(groups) for n in range(size)]


def test_plan_keeps_groups_whole_and_uses_each_pair_once_an_epoch():
    pairs = lengths_to_plan(*(1 + g % 5 for g in range(40)))
    steps = train.plan(pairs, 8, 2, seed=3, microbatch=4)
    assert steps == train.plan(pairs, 8, 2, seed=3, microbatch=4)
    assert steps != train.plan(pairs, 8, 2, seed=4, microbatch=4)
    flat = [[row for some in step for row in some] for step in steps]
    ids, half = [row["id"] for step in flat for row in step], len(pairs)
    assert sorted(ids[:half]) == sorted(ids[half:]) == sorted(row["id"] for row in pairs)
    assert ids[:half] != ids[half:]
    counts, total = [len(step) for step in flat], 0
    assert max(counts) <= 8
    for count in counts:
        total += count
        if total == half:
            break
    assert total == half  # an epoch ends with a step
    for some in sum(steps, []):
        groups = {row["prompt_id"] for row in some}
        for group in groups:
            assert sum(row["prompt_id"] == group for row in some) == 1 + group % 5
        assert len({r for row in some for r in row["responses"]}) <= 4 or len(groups) == 1
    assert any(len({row["prompt_id"] for row in some}) > 1 for step in steps for some in step)


def test_plan_of_a_large_group_and_of_targets():
    big = lengths_to_plan(20)
    assert train.plan(big, 8, 1, seed=0, microbatch=4) == [[big]]
    # Targets share no response: those of a prompt need no common step, and a step is full.
    alone = [{**row, "responses": row["responses"][1:]} for row in lengths_to_plan(5, 20)]
    steps = train.plan(alone, 8, 1, seed=0, microbatch=3)
    assert [sum(map(len, step)) for step in steps] == [8, 8, 8, 1]
    assert all(len(some) <= 3 for step in steps for some in step)
    for step in steps:  # neighbours in length, so that a microbatch is little padding
        longest = [len(row["responses"][0][1]) for some in step for row in some]
        assert longest == sorted(longest)


def test_rate_rises_then_falls():
    shares = [train.rate(step, 20, 0.2) for step in range(20)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    falls = [a - b for a, b in zip(shares[4:], shares[5:])]
    assert falls == pytest.approx([1 / 16] * 15) and shares[-1] == pytest.approx(1 / 16)
    assert train.rate(0, 1, 0.5) == 1.0


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


def test_log_probs_match_the_plain_way(tiny_model, tmp_path):
    model, tokenizer = load(tiny_model)
    rows = [pair(f"{'x' * i}", "y" * (1 + 7 * i), "n" * (30 - i), 0, ("stop", "length"))
            for i in range(6)]  # several pieces, all lengths different
    responses = train.distinct(encoded(tokenizer, tmp_path, rows))
    found = train.completion_logps(model, responses, settings())
    assert list(found) == responses and len(found) == 12 > train.PIECE
    for (prompt, completion), logps in found.items():
        assert logps.shape == (len(completion),) and logps.dtype == torch.float32
        right = plain_logp(model, (prompt, completion)).item()
        assert logps.sum().item() == pytest.approx(right, abs=1e-3)
    rough = train.completion_logps(model, responses, settings(dtype="bfloat16"))  # by autocast
    gaps = [(logps - found[response]).abs().max() for response, logps in rough.items()]
    assert 1e-4 < max(gaps) < 0.1 and rough[responses[0]].dtype == torch.float32


def test_a_shared_response_goes_through_once(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = load(tiny_model)
    rows, seen = encoded(tokenizer, tmp_path, UNEVEN[:5]), []
    monkeypatch.setattr(train, "piece_logps", lambda model, piece: seen.extend(piece) or tuple(
        torch.zeros(len(completion)) for _, completion in piece))
    reference = {response: torch.zeros(len(response[1])) for response in train.distinct(rows)}
    train.step_loss(model, [rows], reference, settings(), learn=False)
    assert len(seen) == 6 == len(set(seen))  # 5 pairs, one chosen
    lengths = [len(p) + len(c) for p, c in seen]
    assert lengths == sorted(lengths)


def gradients(model, rows, args):
    """(loss, metrics, {weight: gradient}) of one step over all rows, far from the reference."""
    step, = train.plan(rows, 99, 1, 0, args.microbatch)
    noise = torch.Generator().manual_seed(5)
    reference = {(p, c): 5 * torch.randn(len(c), dtype=torch.float64, generator=noise)
                 for p, c in train.distinct(rows)}
    model.zero_grad()
    loss, metrics = train.step_loss(model, step, reference, args, learn=True)
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    largest = max(len(train.distinct(some)) for some in step)
    return loss, metrics, found, reference, largest


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 1e-6), (torch.float64, 2e-8)])
def test_passes_and_chunks_change_no_gradient(kind, tolerance, tiny_model, tmp_path, monkeypatch):
    """A group of 6 responses in one pass and in two, the head whole and in chunks: all as plain."""
    model, tokenizer = load(tiny_model)
    model, rows = model.to(kind), encoded(tokenizer, tmp_path, UNEVEN)
    found = {size: gradients(model, rows, settings(microbatch=size)) for size in (32, 1, 2, 3)}
    assert [largest for *_, largest in found.values()] == [11, 6, 6, 6]  # three need two passes
    monkeypatch.setattr(train, "HEAD", 3)
    found["chunks"] = gradients(model, rows, settings())
    found["both"] = gradients(model, rows, settings(microbatch=2))

    model.zero_grad()
    reference, margins = found[32][3], []
    for row in rows:
        policy = [plain_logp(model, response) for response in row["responses"]]
        ref = [reference[response].sum() for response in row["responses"]]
        margins.append(0.1 * ((policy[0] - ref[0]) - (policy[1] - ref[1])))
    right = sum(-logsigmoid(margin) for margin in margins) / len(rows)
    right.backward()
    assert max(margins) - min(margins) > 1  # pairs weigh differently
    for loss, metrics, grads, *_ in found.values():
        assert loss == pytest.approx(right.item(), abs=tolerance)
        mean = sum(margins).item() / len(rows)
        assert metrics["rewards/margins"] == pytest.approx(mean, rel=1e-5)
        for name, weight in model.named_parameters():
            gap, largest = (grads[name] - weight.grad).abs().max(), weight.grad.abs().max()
            assert gap <= min(tolerance, 1e-5 * largest), name


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


@pytest.mark.parametrize("loss, rows, microbatch", [
    ("dpo", TOY, 32), ("dpo", UNEVEN, 2), ("sft", TARGETS, 32), ("sft", TARGETS, 2)])
def test_updates_match_a_plain_loop(loss, rows, microbatch, tiny_model, tmp_path):
    """Three steps against the losses spelled out: no sharing, padding, pieces, passes or chunks."""
    ours, plain, reference = (load(tiny_model)[0].double() for _ in range(3))
    tokenizer = load(tiny_model)[1]
    args = settings(loss=loss, microbatch=microbatch, clip=0.5)
    steps = train.plan(encoded(tokenizer, tmp_path, rows), 3, 2, 0, microbatch)[:3]
    known = reference_of(tmp_path, ours, steps, args) if loss == "dpo" else {}
    log = loop(tmp_path, ours, steps, known, args)

    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for number, row in enumerate(log):
        pairs = [pair for some in steps[number] for pair in some]
        mean, right = plain_loss(loss, plain, reference, pairs)
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item()
        optimizer.param_groups[0]["lr"] = 1e-3 * (3 - number) / 3
        optimizer.step()
        optimizer.zero_grad()
        right |= {"step": number, "epoch": round(number / 3, 4), "loss": mean.item(),
                  "learning_rate": 1e-3 * (3 - number) / 3, "grad_norm": norm}
        assert row == pytest.approx(right, rel=1e-7, abs=1e-7)
    assert number == 2 and norm > 0.5
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        assert (a - b).abs().max() < 1e-6, name


def small_run(tiny_model, tmp_path):
    """What `train` takes, of two pairs: (model, steps, reference)."""
    model, tokenizer = load(tiny_model)
    steps = train.plan(encoded(tokenizer, tmp_path, TOY[:2]), 8, 1, 0, 32)
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
    reference[steps[0][0][0]["responses"][0]] += 3.0
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(SystemExit, match="not the reference"):
        loop(tmp_path, model, steps, reference, settings())
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("refused, kind, config, change", [
    (False, GraniteForCausalLM, GraniteConfig, {"logits_scaling": 1.0}),
    (True, GraniteForCausalLM, GraniteConfig, {"logits_scaling": 2.0}),
    (False, Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": None, "head_dim": 8}),
    (True, Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 0.1, "head_dim": 8})])
def test_a_head_that_does_more_is_refused(refused, kind, config, change, tiny_model, tmp_path):
    _, tokenizer = load(tiny_model)
    torch.manual_seed(0)
    kind(config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
                initializer_range=0.5, **change)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = run_train(tmp_path, tmp_path / "model", "--full", rows=TOY[:2], held=None)
    assert done.returncode == 2 * refused, done.stderr
    assert ("scaled or soft-capped head" in done.stderr) == refused
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
    assert "ln 2" in done.stdout and "held-out" in done.stdout

    # what was saved is a bf16 model that prefers "yes", with the tokenizer and chat template
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    tuned, tokenizer = load(tmp_path / "tuned")
    assert margin(tuned, tokenizer, tmp_path) > margin(*load(tiny_model), tmp_path) + 5
    card = (tmp_path / "tuned" / "README.md").read_text(encoding="utf-8")
    assert "--epochs 6" in card and "sha256" in card


def margin(model, tokenizer, tmp_path):
    """By how many nats the model prefers "yes yes." for a prompt it was not trained on."""
    row, = encoded(tokenizer, tmp_path, [pair("atoll")])
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
    without = margin(base, tokenizer, tmp_path)
    ours, *_ = load_model(str(tiny_model), adapter=str(out), dtype="float32", device="cpu")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), out)
    assert margin(plain, tokenizer, tmp_path) > without + 1
    assert margin(ours, tokenizer, tmp_path) == pytest.approx(margin(plain, tokenizer, tmp_path))
    with plain.disable_adapter():
        assert margin(plain, tokenizer, tmp_path) == pytest.approx(without)


def test_base_weights_stay_as_they_are(tiny_model, tmp_path):
    model, tokenizer = load(tiny_model)
    model = train.with_lora(model, SimpleNamespace(seed=0, lora_r=4, lora_alpha=8))
    steps = train.plan(encoded(tokenizer, tmp_path, UNEVEN), 3, 1, 0, 2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = settings(microbatch=2)
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
               for row in encoded(tokenizer, tmp_path, TARGETS)}
    assert lengths["a/0"] == len("yes") + 1 and lengths["a/1"] == len("yes, it is")
    assert sum(row["tokens"] for row in log[1:-1]) == 4 * sum(lengths.values())
    for row, folder in ((log[0], tiny_model), (log[-1], tmp_path / "tuned")):
        model, _ = load(folder)  # saved in bf16: the last figure is not so sharp
        response, = encoded(tokenizer, tmp_path, held)[0]["responses"]
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


@pytest.mark.parametrize("name", ["tuned", "tuned.tmp"])
def test_a_folder_of_somebody_else_is_never_replaced(name, tiny_model, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("x")
    for flags in ([], ["--overwrite"]):
        done = run_train(tmp_path, tiny_model, *flags)
        assert done.returncode == 2 and f"{name} is there" in done.stderr
        assert reliability.snapshot(tmp_path / name) == {tmp_path / name / "thesis.tex": b"x"}


def test_out_in_a_new_folder_and_with_a_slash(tiny_model, tmp_path):
    """`runs/new/tuned/`, twice: nothing is lost, nothing is left lying about."""
    for _ in range(2):
        done = run_train(tmp_path, tiny_model, "--overwrite", out=f"{tmp_path}/new/tuned/")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "new" / "tuned" / "adapter_model.safetensors").exists()
        left = {path.name for path in (tmp_path / "new").iterdir()}
        assert {name for name in left if "reference-" not in name} == {"tuned", "tuned.args.json"}


def test_overwrite_takes_nothing_from_the_run_before(tiny_model, tmp_path):
    """Not its weights, when it was killed in the final save, and not its checkpoints."""
    interrupt(tmp_path, tiny_model, "--full", "--save-every", 1, "--batch", 4, at=2)
    (tmp_path / "tuned.tmp" / "model.safetensors").write_bytes(b"of all weights")
    assert run_train(tmp_path, tiny_model, "--overwrite").returncode == 0
    assert run_train(tmp_path, tiny_model, out="fresh").returncode == 0
    assert bytes_of(tmp_path / "tuned") == bytes_of(tmp_path / "fresh")
    assert not (tmp_path / "tuned" / "model.safetensors").exists()


def test_flags_of_a_checkpoint_are_its_own(tiny_model, tmp_path):
    """An --overwrite that died right after its args.json does not inherit older checkpoints."""
    flags = ["--save-every", 1, "--batch", 4]
    interrupt(tmp_path, tiny_model, *flags, at=2)
    memo = tmp_path / "tuned.tmp.args.json"
    memo.write_text(memo.read_text().replace('"beta": 0.1', '"beta": 0.2'))
    done = run_train(tmp_path, tiny_model, *flags, "--beta", 0.2)
    assert done.returncode == 2 and "begun from another model, flags" in done.stderr


@pytest.mark.parametrize("change, named", [
    ({"chosen": []}, "chosen"), ({"rejected": [{"role": "assistant"}]}, "rejected"),
    ({"finish": {"chosen": "eos"}}, "finish"), ({"finish": "eos"}, "finish"),
    ({"prompt": 3}, "prompt"), ({"chosen": "x"}, "chosen"), ({"chosen": said("x") * 2}, "chosen"),
])
def test_bad_rows_are_refused(tiny_model, tmp_path, change, named):
    done = run_train(tmp_path, tiny_model, rows=[pair("a"), {**pair("b"), **change}], held=None)
    assert done.returncode == 2 and named in done.stderr and "prefs.jsonl" in done.stderr
    assert not list(tmp_path.glob("tuned*"))


def test_rows_of_another_loss_are_refused(tiny_model, tmp_path):
    for flags, rows in ((["--loss", "sft"], TOY), ([], TARGETS)):
        done = run_train(tmp_path, tiny_model, *flags, rows=rows, held=None)
        assert done.returncode == 2 and "prefs.jsonl:1: expected" in done.stderr


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
    steps = train.plan(encoded(tokenizer, tmp_path, UNEVEN + again), 3, 4, 0, 6)
    batches = [train.distinct(some) for step in steps for some in step]

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
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------------------------------------
# Checkpoints and kills

def interrupt(folder, *args, at, **kwargs):
    """Ctrl-C before the update of step `at`."""
    real = train.rate
    hands = mock.Mock(side_effect=lambda step, *rest: real(step, *rest) if step < at else
                      (_ for _ in ()).throw(KeyboardInterrupt))
    with mock.patch.object(train, "rate", hands), pytest.raises(KeyboardInterrupt):
        run_train(folder, *args, **kwargs)


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
        steps = [path.name for path in (tmp_path / "again").glob("tuned.tmp/step-*")]
        assert sorted(steps) == [f"step-{n:07d}.pt" for n in range(2, at + 1, 2)][-2:]
    assert run_train(tmp_path / "again", tiny_model, *flags).returncode == 0
    assert bytes_of(tmp_path / "again" / "tuned") == bytes_of(tmp_path / "whole" / "tuned")


def test_a_checkpoint_of_another_model_is_refused(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    flags = ["--full", "--save-every", 1, "--batch", 4]
    interrupt(tmp_path, model, *flags, at=2)
    before = reliability.snapshot(tmp_path / "tuned.tmp")
    other_weights(tiny_model, model)
    done = run_train(tmp_path, model, *flags)
    assert done.returncode == 2 and "begun from another model" in done.stderr
    shutil.copytree(tiny_model, model, dirs_exist_ok=True)
    done = run_train(tmp_path, model, *flags, held=HELD[1:])
    assert done.returncode == 2 and "or rows to evaluate" in done.stderr
    assert reliability.snapshot(tmp_path / "tuned.tmp") == before
    assert run_train(tmp_path, model, *flags).returncode == 0


def pounce(pid, there):
    """kill -9 a run while there() holds: stop it first, then look again, as it may just have
    gone on. False where the run ended before."""
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
    began = time.time()
    reliability.start(launcher, command(tmp_path / "whole", tiny_model, *flags))
    assert reliability.finish(launcher) == 0
    took, whole = time.time() - began, bytes_of(tmp_path / "whole" / "tuned")
    assert len(whole) == 2
    argv = command(tmp_path / "killed", tiny_model, *flags)
    out, work = tmp_path / "killed" / "tuned", tmp_path / "killed" / "tuned.tmp"

    def rows():
        log = work / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def checkpoint(least):
        return max(work.glob("step-*.pt"), default=work).stem >= f"step-{least:07d}"

    moments = [lambda: (work / "new").exists() and checkpoint(2),
               lambda: (work / "new").exists() and checkpoint(6),
               lambda: rows() >= 14 and not (work / "new").exists(),
               lambda: bool([*work.glob("*.json"), *work.glob("*model.safetensors")])]
    for there in moments:
        for _ in range(5):
            caught = pounce(reliability.start(launcher, argv), there)
            assert reliability.finish(launcher) == (-signal.SIGKILL if caught else 0)
            if caught:
                break
            shutil.rmtree(out)  # this machine was too busy to see it in time: once more
        assert there() and not out.exists()
    dice, ended = random.Random(time.time_ns()), 0
    for _ in range(20 if os.environ.get("NANOFACT_CHAOS") else 0):
        pid, pause = reliability.start(launcher, argv), dice.uniform(0, took)
        time.sleep(pause)
        with suppress(ProcessLookupError):  # it was done before
            os.kill(pid, signal.SIGKILL)
        if reliability.finish(launcher) == 0:
            ended += 1
            assert bytes_of(out) == whole, pause
            shutil.rmtree(out)
    reliability.start(launcher, argv)
    assert reliability.finish(launcher) == 0, ended
    assert bytes_of(out) == whole
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (tmp_path / "whole" / "tuned").iterdir()}
    assert not work.exists() and not list(out.glob("step-*"))


def test_a_second_process_is_refused(tiny_model, launcher, tmp_path):
    argv = command(tmp_path, tiny_model, *LONG)
    work = tmp_path / "tuned.tmp"
    pid = reliability.start(launcher, argv)
    try:
        while not (work / "log.jsonl").exists() or not (work / "log.jsonl").stat().st_size:
            os.kill(pid, 0)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.01)
        before = reliability.snapshot(work)
        done = run_train(tmp_path, tiny_model, *LONG)
        assert done.returncode == 2 and "another process" in done.stderr
        assert reliability.snapshot(work) == before
    finally:
        os.kill(pid, signal.SIGCONT)
    assert reliability.finish(launcher) == 0
    steps = [row["step"] for row in read_rows(tmp_path / "tuned" / "log.jsonl") if "loss" in row]
    assert steps == list(range(16))
