"""05_train.py: tokens, the shift, the plan, and training against a plain loop written apart."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import call, read_rows, stage, write_rows
from torch.nn.functional import logsigmoid

train = stage("05_train")


def pair(name, chosen="yes yes.", rejected="no no.", n=0, finish=("stop", "stop")):
    return {"id": f"{name}>{n}", "prompt_id": name,
            "prompt": [{"role": "user", "content": f"Is {name} a country?"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "finish": dict(zip(("chosen", "rejected"), finish))}


TOY = [pair(f"land{i}", "yes yes.", ["no no.", "nope, no."][n], n, (("stop", "length")[n], "stop"))
       for i in range(8) for n in range(2)]
HELD = [pair(f"isle{i}") for i in range(4)]


def run_train(tmp_path, model, *flags, rows=TOY, held=HELD, out="tuned", **kwargs):
    prefs = write_rows(tmp_path / "prefs.jsonl", rows)
    if held:
        flags += ("--eval-prefs", write_rows(tmp_path / "held.jsonl", held))
    return call("05_train.py", "--prefs", prefs, "--out", tmp_path / out, "--model", model,
                "--device", "cpu", "--lr", 1e-3, *flags, **kwargs)


def load(folder):
    from common import load_model
    return load_model(str(folder), dtype="float32", device="cpu")[:2]


def encoded(tokenizer, tmp_path, rows, max_length=1024):
    read = train.read_pairs(write_rows(tmp_path / "rows.jsonl", rows))
    return train.encode_pairs(tokenizer, read, max_length)


def plain_logp(model, prompt, completion):
    """One response at a time, the whole sequence through the whole model."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids).logits.float().log_softmax(-1)[0]
    at = range(len(prompt), ids.shape[1])
    return sum(logps[t - 1, ids[0, t]] for t in at)


# ---------------------------------------------------------------------------------------------
# Tokens

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
    assert [p["id"] for p in whole] == ["a>0", "b>0", "c>0"]
    assert encoded(tokenizer, tmp_path, rows, 200) == whole[:1]
    length = sum(map(len, whole[0]["chosen"]))
    assert len(encoded(tokenizer, tmp_path, rows[:1], length)) == 1
    assert len(encoded(tokenizer, tmp_path, rows[:1], length - 1)) == 0


def test_rows_of_others_are_whole(tiny_model, tmp_path):
    row = pair("a")
    del row["finish"], row["prompt_id"]
    read, = train.read_pairs(write_rows(tmp_path / "rows.jsonl", [row]))
    assert read["chosen"] == ("yes yes.", "stop") and read["prompt_id"] == json.dumps(row["prompt"])


# ---------------------------------------------------------------------------------------------
# The plan

def test_plan_keeps_groups_whole_and_uses_each_pair_once_an_epoch():
    pairs = [{"id": f"{g}/{n}", "prompt_id": g} for g in range(40) for n in range(1 + g % 5)]
    steps = train.plan(pairs, 8, 2, seed=3)
    assert steps == train.plan(pairs, 8, 2, seed=3) != train.plan(pairs, 8, 2, seed=4)
    ids = [p["id"] for step in steps for p in step]
    half = len(pairs)
    assert sorted(ids[:half]) == sorted(ids[half:]) == sorted(p["id"] for p in pairs)
    assert ids[:half] != ids[half:]
    counts, total = [len(step) for step in steps], 0
    assert max(counts) <= 8
    for count in counts:
        total += count
        if total == half:
            break
    assert total == half  # an epoch ends with a step
    for step in steps:
        for group in {p["prompt_id"] for p in step}:
            assert sum(p["prompt_id"] == group for p in step) == 1 + group % 5
    big = [{"id": n, "prompt_id": "one"} for n in range(20)]
    assert [len(step) for step in train.plan(big, 8, 1, seed=0)] == [20]


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


def test_the_shift_in_powers_of_two():
    responses = [((0, 0, 0), (1, 1)), ((0,), (1, 1, 1, 1)), ((0, 1), (1,))]
    found = train.chunk_logps(clock_model(), responses)
    # completion tokens at 3, 4 are scored at 2, 3; at 1..4 by 0..3; at 2 by 1
    assert found.tolist() == pytest.approx([-(4 + 8), -(1 + 2 + 4 + 8), -2], abs=1e-9)


def test_log_probs_match_the_plain_way(tiny_model, tmp_path):
    model, tokenizer = load(tiny_model)
    rows = [pair(f"{'x' * i}", "y" * (1 + 7 * i), "n" * (30 - i), 0, ("stop", "length"))
            for i in range(6)]  # more than a chunk, all lengths different
    step = encoded(tokenizer, tmp_path, rows)
    found = train.step_logps(model, step, bf16=False)
    assert len(found) == 12 > train.CHUNK
    for (prompt, completion), logp in found.items():
        assert logp.item() == pytest.approx(plain_logp(model, prompt, completion).item(), abs=1e-3)


def test_a_shared_response_goes_through_once(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = load(tiny_model)
    step = encoded(tokenizer, tmp_path, [pair("a", "yes", "n" * n, n) for n in range(1, 6)])
    seen = []
    monkeypatch.setattr(train, "chunk_logps",
                        lambda model, chunk: seen.extend(chunk) or torch.zeros(len(chunk)))
    train.step_logps(model, step, bf16=False)
    assert len(seen) == 6 == len(set(seen))  # 5 pairs, one chosen
    lengths = [len(p) + len(c) for p, c in seen]
    assert lengths == sorted(lengths)


def test_updates_match_a_plain_loop(tiny_model, tmp_path):
    """Three steps, fp32, against DPO spelled out pair by pair: no sharing, padding or chunks."""
    ours, tokenizer = load(tiny_model)
    plain, _ = load(tiny_model)
    steps = train.plan(encoded(tokenizer, tmp_path, TOY), 5, 1, seed=0)[:3]
    args = SimpleNamespace(dtype="float32", lr=1e-3, beta=0.1, clip=1.0, warmup=0.0, epochs=1)
    rows = []
    train.train(ours, steps, train.all_logps(ours, steps, False), args, rows.append)

    reference, _ = load(tiny_model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for number, step in enumerate(steps):
        losses = []
        for p in step:
            with torch.no_grad():
                ref = plain_logp(reference, *p["chosen"]) - plain_logp(reference, *p["rejected"])
            policy = plain_logp(plain, *p["chosen"]) - plain_logp(plain, *p["rejected"])
            losses.append(-logsigmoid(0.1 * (policy - ref)))
        loss = sum(losses) / len(losses)
        assert rows[number]["loss"] == pytest.approx(loss.item(), abs=1e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * (3 - number) / 3
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        assert (a - b).abs().max() < 1e-4, name


# ---------------------------------------------------------------------------------------------
# The command

def test_it_learns_a_toy_preference_and_says_so(tiny_model, tmp_path):
    done = run_train(tmp_path, tiny_model, "--epochs", 6, "--batch", 6)
    assert done.returncode == 0, done.stderr
    log = read_rows(tmp_path / "tuned" / "log.jsonl")
    before, steps, after = log[0], log[1:-1], log[-1]
    assert abs(steps[0]["loss"] - math.log(2)) < 1e-6 and steps[0]["rewards/margins"] == 0
    assert abs(before["eval_loss"] - math.log(2)) < 2e-2
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"] and steps[-1]["rewards/accuracies"] == 1
    assert after["eval_rewards/accuracies"] > 0.5 and after["eval_loss"] < before["eval_loss"]
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert "ln 2" in done.stdout and "held-out" in done.stdout

    # what was saved is a bf16 model that prefers "yes", with the tokenizer and chat template
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tuned, tokenizer = load(tmp_path / "tuned")
    base, _ = load(tiny_model)
    p = encoded(tokenizer, tmp_path, [pair("atoll")])[0]

    def margin(model):
        return (plain_logp(model, *p["chosen"]) - plain_logp(model, *p["rejected"])).item()

    assert margin(tuned) > margin(base) + 5
    card = (tmp_path / "tuned" / "README.md").read_text(encoding="utf-8")
    assert "--epochs 6" in card and "sha256" in card


def test_two_runs_are_bit_equal_and_a_finished_one_is_left_alone(tiny_model, tmp_path):
    for out in ("a", "b"):
        assert run_train(tmp_path, tiny_model, out=out).returncode == 0
    for name in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    stamp = (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns
    again = run_train(tmp_path, tiny_model, out="a")
    assert again.returncode == 0 and "finished" in again.stdout
    other = run_train(tmp_path, tiny_model, "--beta", 0.2, out="a")
    assert other.returncode == 2 and "--beta 0.1 -> 0.2" in other.stderr
    more = run_train(tmp_path, tiny_model, out="a", rows=TOY + [pair("new")])
    assert more.returncode == 2 and "fewer rows" in more.stderr
    changed = run_train(tmp_path, tiny_model, out="a", rows=TOY[1:])
    assert changed.returncode == 2 and "other rows" in changed.stderr
    assert (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns == stamp
    assert run_train(tmp_path, tiny_model, "--beta", 0.2, "--overwrite", out="a").returncode == 0
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_of_somebody_else_is_never_replaced(tiny_model, tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "thesis.tex").write_text("x")
    done = run_train(tmp_path, tiny_model, "--overwrite")
    assert done.returncode == 2 and (tmp_path / "tuned" / "thesis.tex").exists()


def test_what_a_killed_run_left_is_swept_away(tiny_model, tmp_path):
    (tmp_path / "tuned.tmp").mkdir()
    (tmp_path / "tuned.tmp" / "log.jsonl").write_text('{"step": 0}\n')
    assert run_train(tmp_path, tiny_model, held=None).returncode == 0
    steps = [row["step"] for row in read_rows(tmp_path / "tuned" / "log.jsonl")]
    assert steps == list(range(len(steps)))


def test_nan_stops_with_the_rows_of_its_step(tiny_model, tmp_path, capsys):
    model, tokenizer = load(tiny_model)
    steps = train.plan(encoded(tokenizer, tmp_path, TOY[:2]), 8, 1, seed=0)
    reference = train.all_logps(model, steps, False)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    args = SimpleNamespace(dtype="float32", lr=1e-3, beta=0.1, clip=1.0, warmup=0.0, epochs=1)
    with pytest.raises(SystemExit, match="land0>0, land0>1"):
        train.train(model, steps, reference, args, None)


def test_another_reference_is_noticed_at_step_0(tiny_model, tmp_path):
    model, tokenizer = load(tiny_model)
    steps = train.plan(encoded(tokenizer, tmp_path, TOY[:2]), 8, 1, seed=0)
    reference = train.all_logps(model, steps, False)
    reference[steps[0][0]["chosen"]] += 3.0
    args = SimpleNamespace(dtype="float32", lr=1e-3, beta=0.1, clip=1.0, warmup=0.0, epochs=1)
    with pytest.raises(SystemExit, match="not the reference"):
        train.train(model, steps, reference, args, None)


@pytest.mark.parametrize("change, named", [
    ({"chosen": []}, "chosen"), ({"rejected": [{"role": "assistant"}]}, "rejected"),
    ({"finish": {"chosen": "eos"}}, "finish"), ({"prompt": 3}, "prompt"),
    ({"chosen": "x"}, "chosen"),
])
def test_bad_rows_are_refused(tiny_model, tmp_path, change, named):
    done = run_train(tmp_path, tiny_model, rows=[pair("a"), {**pair("b"), **change}], held=None)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "tuned").exists()


def test_prompts_on_both_sides_are_refused(tiny_model, tmp_path):
    done = run_train(tmp_path, tiny_model, held=[pair("land3")])
    assert done.returncode == 2 and "land3" in done.stderr and not (tmp_path / "tuned").exists()
