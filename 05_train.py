"""
Stage 5. Train a model on preferences with a loss of losses.py: here plain DPO of all weights.

Reads   prefs.jsonl   04's pairs, or anybody's in TRL's form: {"prompt": [messages],
                      "chosen": [assistant message], "rejected": [assistant message]} and, where
                      known, "prompt_id", "finish": {"chosen": "stop", "rejected": "length"}
Writes  OUT/          bf16 safetensors and tokenizer, which transformers and vLLM load as they are;
                      README.md, the model card; log.jsonl under TRL's names:
  {"step": 0, "epoch": 0.0, "learning_rate": 5e-06, "loss": 0.6931, "grad_norm": 21.4,
   "rewards/margins": 0.0, "rewards/accuracies": 0.0, "logps/chosen": -81.2, ...}
  with --eval-prefs also a row before and one after training, each name with "eval_" in front

Prompt and completion are tokenised apart and joined. The end-of-turn token ends a completion, and
is trained on, only where its finish is "stop" (rows that do not say are whole). A step is whole
prompt groups, up to --batch pairs (a larger group is a step of its own). A response goes through
the model once, however many pairs of the step share it; only its completion meets the LM head.
Weights are fp32 under bf16 autocast (in pure bf16, AdamW's updates are lost to rounding), log-probs
fp32, dropout off. The reference is the model as loaded: its log-probs are computed beforehand.

Not as in the paper: FactTune trains with RMSprop at lr 5e-7, and after an SFT stage.
Not yet: LoRA, other losses, several GPUs, models with a soft-capped head, resuming inside a run. A
killed run leaves OUT.tmp and starts anew; a finished one is recognised and left alone.

CPU, 3 minutes:  python 05_train.py --prefs runs/demo/prefs.jsonl --out runs/demo/tuned
One GPU:         python 05_train.py --prefs runs/x/prefs.jsonl --out runs/x/tuned --batch 32 \\
                     --model HuggingFaceTB/SmolLM2-1.7B-Instruct --lr 1e-6
"""
import argparse
import math
import random
import shlex
import shutil
import sys
from pathlib import Path

from common import (as_messages, die, dumps, load_model, progress, prompt_ids, read_jsonl, report,
                    run, same_run, write_whole)

SIDES = ("chosen", "rejected")
CHUNK = 8  # responses in one forward pass; they are sorted by length, so few pads are computed


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--prefs", dest="inp", required=True, metavar="FILE", help="pairs to train on (04)")
    add("--eval-prefs", metavar="FILE", help="pairs of other prompts: evaluated before and after")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace an OUT made with other flags")
    add("--limit", type=int, metavar="N", help="only the first N rows")
    add("--max-length", type=int, default=1024, help="leave out rows with more tokens (TRL: 1024)")
    add("--model", default="data/world/model", help="a folder or a hub name: policy and reference")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="autocast's type")
    add("--loss", default="dpo", choices=["dpo"], help="which function of losses.py")
    add("--beta", type=float, default=0.1, help="pull to the reference (DPO's own: 0.1)")
    add("--lr", type=float, default=1e-5, help="AdamW's peak rate (1B and more: 5e-7 to 1e-6)")
    add("--warmup", type=float, default=0.1, help="share of steps in which the rate rises")
    add("--clip", type=float, default=1.0, help="largest gradient norm (TRL: 1)")
    add("--epochs", type=int, default=1, help="passes over the pairs")
    add("--batch", type=int, default=8, help="pairs a step")
    add("--seed", type=int, default=0, help="order of the prompt groups")
    args = p.parse_args()
    counts = (args.epochs, args.batch, args.max_length, args.limit)
    if any(n is not None and n < 1 for n in counts):
        die("expected --epochs, --batch, --max-length and --limit of at least 1")
    if min(args.lr, args.beta, args.clip) <= 0 or not 0 <= args.warmup < 1:
        die("expected --lr, --beta and --clip above 0, and 0 <= --warmup < 1")
    return args


# ---------------------------------------------------------------------------------------------
# Rows, tokens, steps

def read_pairs(path, limit=None):
    """Pairs {"id", "prompt_id", "prompt": [messages], "chosen": (text, finish), "rejected"}."""
    pairs = []
    fields = {"prompt": (str, list), "chosen": list, "rejected": list}
    for row in read_jsonl(path, fields, made_by="04_build_prefs.py")[:limit]:
        prompt = as_messages(row["prompt"])
        group = row.get("prompt_id", dumps(prompt))
        pair = {"id": row["id"], "prompt_id": group, "prompt": prompt}
        finish = row.get("finish", {})
        for side in SIDES:
            texts = [m.get("content") if isinstance(m, dict) else None for m in row[side]]
            ended = finish.get(side, "stop") if isinstance(finish, dict) else finish
            if len(texts) != 1 or type(texts[0]) is not str or ended not in ("stop", "length"):
                die(f"{path}: row {row['id']!r}: expected {side!r} as one assistant message, its "
                    f"finish as stop or length, found {row[side]!r:.60} and {ended!r:.20}")
            pair[side] = texts[0], ended
        pairs.append(pair)
    return pairs


def encode(tokenizer, prompt, text, finish):
    """(prompt ids, completion ids), as tuples: equal responses are one key of a dictionary.

    split_special_tokens: a response that spells out "<|im_end|>" does not end its turn by it.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = [tokenizer.eos_token_id] if finish == "stop" else []
    return tuple(prompt_ids(tokenizer, prompt)), (*ids, *end)


def encode_pairs(tokenizer, pairs, max_length):
    """The pairs that fit, their sides as `encode` gives them. A label speaks of the whole text, so
    a response that is too long is left out, never cut; an empty one has nothing to train on."""
    out = []
    for pair in pairs:
        sides = {s: encode(tokenizer, pair["prompt"], *pair[s]) for s in SIDES}
        if all(c and len(p) + len(c) <= max_length for p, c in sides.values()):
            out.append({**pair, **sides})
    return out


def plan(pairs, batch, epochs, seed):
    """Steps, as lists of pairs: whole prompt groups, shuffled anew each epoch."""
    groups, steps, rng = {}, [], random.Random(seed)
    for pair in pairs:
        groups.setdefault(pair["prompt_id"], []).append(pair)
    order = list(groups.values())
    for _ in range(epochs):
        rng.shuffle(order)
        steps.append([])  # no step runs over the end of an epoch
        for group in order:
            if steps[-1] and len(steps[-1]) + len(group) > batch:
                steps.append([])
            steps[-1] += group
    return steps


# ---------------------------------------------------------------------------------------------
# Log-probabilities. R = responses, T = their longest, H = hidden size, N = their completion tokens

def chunk_logps(model, responses):
    """log p(completion | prompt) of [(prompt ids, completion ids)]: (R,), fp32."""
    import torch

    from losses import sentence_sums, token_logps
    width = max(len(p) + len(c) for p, c in responses)
    # Pads stand on the right, where causal attention never looks: no mask is needed.
    ids = torch.tensor([[*p, *c] + [0] * (width - len(p) - len(c)) for p, c in responses],
                       device=model.device)  # (R, T)
    where = [(r, t) for r, (p, c) in enumerate(responses) for t in range(len(p), len(p) + len(c))]
    row, at = torch.tensor(where, device=model.device).T  # (N,), (N,)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (R, T, H)
    # The shift, here and nowhere else: what the model says at t - 1 scores the token at t.
    logits = model.get_output_embeddings()(hidden[row, at - 1])  # (N, V)
    logps = token_logps(logits[None], ids[row, at][None])  # (1, N)
    return sentence_sums(logps, row[None], len(responses))  # a response is one long sentence


def step_logps(model, step, bf16):
    """{response: log-prob} of the distinct responses of a step; the same batches at every call."""
    import torch
    responses = {pair[side] for pair in step for side in SIDES}
    responses = sorted(responses, key=lambda r: (len(r[0]) + len(r[1]), r))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        chunks = [chunk_logps(model, responses[i:i + CHUNK])
                  for i in range(0, len(responses), CHUNK)]
    return dict(zip(responses, torch.cat(chunks)))


def all_logps(model, steps, bf16):
    """The same for many steps, without a graph; a response counts where it comes first."""
    import torch
    found = {}
    with torch.no_grad():
        for step in progress(steps, desc="log-probs", unit="step"):
            if any(pair[side] not in found for pair in step for side in SIDES):
                found = {**step_logps(model, step, bf16), **found}
    return found


def pair_loss(pairs, policy, reference, beta):
    """DPO of P pairs, from {response: log-prob} twice: losses (P,), metrics."""
    import torch

    from losses import dpo_loss
    columns = [torch.stack([logps[pair[side]] for pair in pairs])
               for logps in (policy, reference) for side in SIDES]
    return dpo_loss(*columns, beta=beta)


# ---------------------------------------------------------------------------------------------
# Training

def rate(step, n, warmup):
    """Share of the peak learning rate: linear up over warmup * n steps, then linear down to 0."""
    rising = int(warmup * n)
    return (step + 1) / (rising + 1) if step < rising else (n - step) / (n - rising)


def train(model, steps, reference, args, log):
    """Update the model in place; log(row) after each step."""
    import torch
    bf16 = args.dtype == "bfloat16"
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    for number, step in enumerate(progress(steps, unit="step")):
        losses, metrics = pair_loss(step, step_logps(model, step, bf16), reference, args.beta)
        loss = losses.mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, args.clip)
        if not torch.isfinite(loss + norm):
            sys.exit(f"step {number}: loss {loss:.4g} and gradient norm {norm:.4g} from the rows "
                     + ", ".join(pair["id"] for pair in step))
        if number == 0:
            print(f"step 0: loss {loss:.4f}; ln 2 = {math.log(2):.4f} where policy is reference")
            if abs(loss.item() - math.log(2)) > (2e-2 if bf16 else 1e-3):
                sys.exit("step 0: the policy is not the reference before training")
        lr = args.lr * rate(number, len(steps), args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        log({"step": number, "epoch": round(number * args.epochs / len(steps), 4),
             "learning_rate": lr, "loss": loss.item(), "grad_norm": norm.item(),
             **{name: value.item() for name, value in metrics.items()}})


def card(args, n_pairs, memo):
    """README.md of the trained model; memo is OUT.args.json: its flags and the hash of its rows."""
    command = shlex.join(["python", "05_train.py", *sys.argv[1:]])
    return (f"---\nlibrary_name: transformers\nbase_model: {args.model}\n---\n\n"
            f"Trained on {n_pairs} preference pairs by nanofact's 05_train.py:\n\n    {command}\n\n"
            f"Flags, number and SHA-256 of the rows:\n\n    {memo}")


def main():
    args = parse_args()
    out, bf16 = Path(args.out), args.dtype == "bfloat16"
    aside = Path(f"{out}.tmp")
    rows = read_pairs(args.inp, args.limit)
    eval_rows = read_pairs(args.eval_prefs) if args.eval_prefs else []
    both = {row["prompt_id"] for row in rows} & {row["prompt_id"] for row in eval_rows}
    if both:
        die(f"{args.eval_prefs}: expected other prompts than --prefs, found {sorted(both)}")
    if out.exists() and not Path(f"{out}.args.json").exists():
        die(f"{out} is there, and no run of this stage made it. Choose another --out")
    memo, text = same_run(out, args, rows)
    if out.exists() and not args.overwrite:
        if memo.read_text(encoding="utf-8") != text:
            die(f"{out} was made from fewer rows. Choose another --out or --overwrite")
        print(f"{out} is finished: the same flags and rows made it")
        return 0
    model, tokenizer, _ = load_model(args.model, dtype="float32", device=args.device)
    pairs = encode_pairs(tokenizer, rows, args.max_length)
    held = encode_pairs(tokenizer, eval_rows, args.max_length)
    if not pairs or (eval_rows and not held):
        die(f"expected rows of at most {args.max_length} tokens (--max-length), found none")
    steps = plan(pairs, args.batch, args.epochs, args.seed)
    held_steps = plan(held, args.batch, 1, args.seed) if held else []
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)

    def log(row):
        with open(aside / "log.jsonl", "a", encoding="utf-8", newline="\n") as f:
            f.write(dumps(row) + "\n")

    def evaluate(step):
        losses, metrics = pair_loss(held, all_logps(model, held_steps, bf16), reference, args.beta)
        log({"step": step, "eval_loss": losses.mean().item(),
             **{f"eval_{name}": value.item() for name, value in metrics.items()}})
        accuracy = f"accuracy {metrics['rewards/accuracies']:.1%}" if step else "every margin 0"
        print(f"step {step}: held-out loss {losses.mean():.4f}, {accuracy}, {len(held)} pairs")

    reference = all_logps(model, steps + held_steps, bf16)
    if held:
        evaluate(0)
    train(model, steps, reference, args, log)
    if held:
        evaluate(len(steps))
    model.bfloat16().save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    write_whole(aside / "README.md", card(args, len(pairs), text))
    shutil.rmtree(out, ignore_errors=True)  # before the memo: a kill here leaves no wrong memo
    write_whole(memo, text)
    aside.rename(out)
    report(rows_in=len(rows), pairs=len(pairs), left_out=len(rows) - len(pairs), steps=len(steps),
           pairs_held_out=len(held))
    return 0


if __name__ == "__main__":
    run(main)
