"""
Sampling, judge calls and search, each beside what it replaces. Part of `make bench`; 15 minutes.

Sampling: 01's loop beside transformers' generate, same model and settings, in turn in
one process, tokens a second up to the end of each turn. Judge calls: a server of its own process
answers after 500 ms (test_chat.py). Search: FTS5 beside rank-bm25 (test_corpus.py). And what 04
takes for 100,000 responses.
"""
import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from conftest import ROOT, read_rows, stage

from common import as_messages, dumps, load_model, prompt_ids

generate = stage("01_generate")
MODEL = str(ROOT / "data" / "world" / "model")
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}
ROUNDS = 3


def theirs(model, tokenizer, prompts, n, budget):
    """Tokens of n responses to each prompt, sampled by generate."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, pad_token_id=pad,
                         num_return_sequences=n, max_new_tokens=budget, **SAMPLING)[:, width:]
    stop = generate.stop_tokens(model, tokenizer)
    return sum(next((i for i, token in enumerate(row) if token in stop), len(row))
               for row in out.tolist())


def ours(model, tokenizer, prompts, n, budget):
    said = generate.sample_batch(model, prompts, n, tuple(SAMPLING.values()), budget,
                                 generate.stop_tokens(model, tokenizer), tokenizer.pad_token_id, 0)
    return sum(len(tokens) for tokens, _ in said)


def side_by_side(name, model, tokenizer, mine, other):
    """mine, other: functions that return tokens made. Tokens a second, medians of ROUNDS."""
    speeds = {"01": [], "generate": []}
    for _ in range(ROUNDS):
        for side, work in (("01", mine), ("generate", other)):
            begun = time.perf_counter()
            with torch.inference_mode():
                tokens = work()
            speeds[side].append(tokens / (time.perf_counter() - begun))
    a, b = (statistics.median(speeds[side]) for side in ("01", "generate"))
    print(f"| {name} | {a:.0f} | {b:.0f} | {a / b:.2f} |", flush=True)


def sampling():
    torch.manual_seed(0)
    model, tokenizer, _ = load_model(MODEL, device="cpu")
    rows = read_rows(ROOT / "data" / "prompts_train.jsonl")[:16]
    prompts = [prompt_ids(tokenizer, as_messages(row["prompt"])) for row in rows]
    # Twenty short answers to each of 4 questions after five demonstrations, as FactTune-MC asks
    demos = read_rows(ROOT / "data" / "demonstrations.jsonl")
    turns = generate.nearest_demos(demos)
    questions = [as_messages(f"What is the capital of {row['topic']}? Answer in a few words.")
                 for row in rows[::4]]
    asked = [prompt_ids(tokenizer, [*turns(question), *question]) for question in questions]
    words = sum(map(len, asked)) // len(asked)
    say = (model, tokenizer)

    def one_at_a_time():
        return sum(theirs(*say, [prompt], 1, 192) for prompt in prompts[:6])

    def same_batch():
        return ours(*say, prompts, 4, 192)

    print("\n| sampling, tokens a second | 01 | generate | ratio |\n|---|---|---|---|")
    side_by_side("64 responses in a batch; generate one at a time", *say, same_batch, one_at_a_time)
    side_by_side("the same 64 in a batch of both", *say, same_batch,
                 lambda: theirs(*say, prompts, 4, 192))
    side_by_side(f"20 answers of 15 tokens to each of 4 questions, prompts of {words} tokens", *say,
                 lambda: ours(*say, asked, 20, 15), lambda: theirs(*say, asked, 20, 15))


def prefs(n=100_000):
    """Seconds and peak memory (on Linux) of 04 on n made-up responses of 3 KB, 6 to a prompt."""
    draw, quiet = random.Random(0), subprocess.DEVNULL
    words = ["".join(draw.choices("abdeiklmnorstuvz", k=7)) for _ in range(50_000)]

    def row(i):
        say, p = lambda k: " ".join(draw.choices(words, k=k)), i // 6  # 8 k - 1 letters
        facts = [{"text": say(9), "label": draw.choice(["S", "NS"]), "evidence": [
            {"title": f"Topic {p}", "text": say(24)}]} for _ in range(6)]
        parts = [{"text": say(15), "start": 120 * j, "end": 120 * j + 119, "facts": facts[j::3]}
                 for j in range(3)]
        return {"id": f"{p}/{i % 6}", "prompt_id": f"{p}", "topic": f"Topic {p}", "finish": "stop",
                "prompt": f"Tell me of {p}.", "response": " ".join(s["text"] for s in parts),
                "fact_based": True, "rating": i % 5 + 1, "sentences": parts}

    print(f"\n| 04 on {n} responses | seconds | GB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as at:
        with open(f"{at}/in", "w") as f:  # row by row: a child's peak is at least its parent's
            f.writelines(dumps(row(i)) + "\n" for i in range(n))
        for rule in ("facttune --reward f1", "factalign --balance", "flame"):
            flags = f"{rule} --in {at}/in --out {at}/{rule[:6]} --eval-out {at}/held"
            begun, command = time.time(), [sys.executable, ROOT / "04_build_prefs.py"]
            child = subprocess.Popen(command + flags.split(), stdout=quiet, stderr=quiet)
            _, status, used = os.wait4(child.pid, 0)
            print(f"| {rule} | {time.time() - begun:.0f} | {used.ru_maxrss * 1024e-9:.2f} |"
                  + " failed" * (status > 0), flush=True)


def parse_args():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--only", choices=["sampling", "calls", "search", "prefs"], help="one of these")
    return p.parse_args()


if __name__ == "__main__":
    args = parse_args()
    if args.only in (None, "sampling"):
        sampling()
    for part, script in (("calls", "test_chat.py"), ("search", "test_corpus.py")):
        if args.only in (None, part):
            subprocess.run([sys.executable, ROOT / "tests" / script], cwd=ROOT, check=True)
    if args.only in (None, "prefs"):
        prefs()
