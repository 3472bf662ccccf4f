"""
Stage 5. Train a model on 04's rows with a loss of losses.py.

Reads   prefs.jsonl   pairs for dpo, completions for sft; anybody's in TRL's form will do:
  {"prompt": [messages], "chosen": [message], "rejected": [message],
   "prompt_id": "fiji-geo", "finish": {"chosen": "stop", "rejected": "length"}}
  {"prompt": [messages], "completion": [message], "finish": "stop"}
Writes  OUT/   a LoRA adapter, or with --full all weights in bf16, as transformers, peft and vLLM
               load it; the tokenizer; README.md, the model card; log.jsonl under TRL's names:
  {"step": 0, "epoch": 0.0, "learning_rate": 5e-06, "loss": 0.6931, "grad_norm": 21.4,
   "rewards/margins": 0.0, "rewards/accuracies": 0.0, "logps/chosen": -81.2, ...}
  and with --eval-prefs rows of held-out figures, each name with "eval_" in front

Prompt and completion are tokenised apart and joined; the end-of-turn token ends a completion, and
is trained on, only where finish is "stop" (rows that do not say are so). All steps are planned
before the first: whole prompt groups, about --batch rows. A response goes through the model once a
step, however many pairs share it, and only its completion meets the LM head. The reference is the
model as loaded; its log-probs are kept beside OUT under a hash of all that they depend on. OUT.tmp
holds two checkpoints: killed anywhere, the same command ends with the same weights. Trained weights
are fp32 under bf16 autocast: in bf16, AdamW's updates would be lost to rounding.

Not as in the paper: FactTune trains with RMSprop at lr 5e-7, and after an SFT stage.
Not yet: other losses and optimizers, --adapter and --ref, several GPUs, soft-capped heads.
CPU, 3 minutes:  python 05_train.py --prefs runs/demo/prefs.jsonl --out runs/demo/lora --lr 1e-4
One GPU:         python 05_train.py --prefs runs/x/prefs.jsonl --out runs/x/tuned --batch 32 \\
                     --model HuggingFaceTB/SmolLM2-1.7B-Instruct"""
import hashlib
import math
import os
import random
import shlex
import shutil
import sys
from pathlib import Path

from common import (arguments, as_messages, die, dumps, load_model, lock, progress, prompt_ids,
                    read_jsonl, report, run, same_run, write_whole)

SIDES = {"dpo": ("chosen", "rejected"), "sft": ("completion",)}
PIECE = 4   # responses in one forward pass: of 8 neighbours in length 27 % are pads, of 4 13 %
HEAD = 512  # completion positions that meet the LM head at once


def parse_args():
    p = arguments(__doc__, inp="--prefs")
    add = p.add_argument
    add("--eval-prefs", metavar="FILE", help="rows of other prompts, to evaluate on")
    add("--max-length", type=int, default=1024, help="leave out rows with more tokens (TRL: 1024)")
    add("--model", default="data/world/model", help="a folder or a hub name: policy and reference")
    add("--full", action="store_true", help="train all weights, not a LoRA adapter")
    add("--lora-r", type=int, default=16, help="rank of the adapter, on all linear layers")
    add("--lora-alpha", type=int, default=32, help="its scale is alpha / r")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="autocast's type")
    add("--loss", default="dpo", choices=list(SIDES), help="which function of losses.py")
    add("--beta", type=float, default=0.1, help="pull to the reference (DPO's own: 0.1)")
    add("--lr", type=float, default=1e-5, help="AdamW's peak rate (LoRA: to 1e-4; all of 1B: 1e-6)")
    add("--warmup", type=float, default=0.1, help="share of steps in which the rate rises")
    add("--clip", type=float, default=1.0, help="largest gradient norm (TRL: 1)")
    add("--epochs", type=int, default=1, help="passes over the rows")
    add("--batch", type=int, default=8, help="rows a step")
    add("--microbatch", type=int, default=32, help="responses whose graph fits into memory")
    add("--save-every", type=int, default=50, metavar="STEPS", help="checkpoint (0: never)")
    add("--eval-every", type=int, default=0, metavar="STEPS", help="(0: before and after)")
    args = p.parse_args()
    if min(args.lr, args.beta, args.clip, args.epochs, args.batch, args.microbatch, args.lora_r,
           1 if args.limit is None else args.limit) <= 0 or not 0 <= args.warmup < 1:
        die("expected numbers above 0, and 0 <= --warmup < 1")
    return args


# ---------------------------------------------------------------------------------------------
# Rows and tokens

def read_rows(path, loss, limit=None):
    """Rows {"id", "prompt_id", "prompt": [messages], "texts": [(text, finish)]}, a text a side."""
    rows, fields = [], {"prompt": (str, list), **dict.fromkeys(SIDES[loss], list)}
    for row in read_jsonl(path, fields, made_by="04_build_prefs.py")[:limit]:
        prompt, finish = as_messages(row["prompt"]), row.get("finish", "stop")
        rows.append({"id": row["id"], "prompt_id": row.get("prompt_id", dumps(prompt)),
                     "prompt": prompt, "texts": []})
        for side in SIDES[loss]:
            found = [m.get("content") if isinstance(m, dict) else None for m in row[side]]
            ended = finish.get(side, "stop") if isinstance(finish, dict) else finish
            if [type(text) for text in found] != [str] or ended not in ("stop", "length"):
                die(f"{path}: row {row['id']!r}: expected {side!r} as one assistant message, its "
                    f"finish as stop or length, found {row[side]!r:.60} and {ended!r:.20}")
            rows[-1]["texts"].append((found[0], ended))
    return rows


def encode(tokenizer, prompt, text, finish):
    """(prompt ids, completion ids), tuples: equal responses are one key of a dictionary."""
    # A response that spells out "<|im_end|>" does not end its turn by it: split_special_tokens.
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = [tokenizer.eos_token_id] if finish == "stop" else []
    return tuple(prompt_ids(tokenizer, prompt)), (*ids, *end)


def encode_rows(tokenizer, rows, max_length):
    """The rows that fit, with "responses" as `encode` gives them. A label speaks of the whole text:
    a response that is too long is left out, never cut; an empty one has nothing to train on."""
    found = []
    for row in rows:
        responses = [encode(tokenizer, row["prompt"], *text) for text in row["texts"]]
        if all(c and len(p) + len(c) <= max_length for p, c in responses):
            found.append({**row, "responses": responses})
    return found


def sentence_ids(tokenizer, text, spans):
    """For each token of `text` the number of the (start, end) span that its first character other
    than space lies in, -1 for none: a token " The" opens the sentence of "The"."""
    coded = tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                      return_offsets_mapping=True)
    firsts = [b - len(text[a:b].lstrip()) for a, b in coded["offset_mapping"]]
    return [next((n for n, (start, end) in enumerate(spans) if start <= first < end), -1)
            for first in firsts]


# ---------------------------------------------------------------------------------------------
# The plan: steps are lists of microbatches, microbatches are lists of rows

def length(response):
    return sum(map(len, response))


def distinct(rows):
    """The responses of some rows, each once, by length."""
    return sorted({r for row in rows for r in row["responses"]}, key=lambda r: (length(r), r))


def microbatches(groups, size):
    """Whole groups of similar length, packed while their distinct responses are at most `size`."""
    packed = []
    for group in sorted(groups, key=lambda rows: length(distinct(rows)[-1])):
        if packed and len(distinct(packed[-1] + group)) <= size:
            packed[-1] = packed[-1] + group
        else:
            packed.append(group)
    return packed


def plan(rows, batch, epochs, seed, microbatch):
    """All steps: a pure function, so resuming needs the number of a step and no more."""
    groups, steps, rng = {}, [], random.Random(seed)
    for row in rows:  # only pairs share responses
        group = row["prompt_id"] if len(row["responses"]) > 1 else row["id"]
        groups.setdefault(group, []).append(row)
    order = list(groups.values())
    for _ in range(epochs if rows else 0):
        rng.shuffle(order)
        steps.append([])  # no step runs over the end of an epoch
        for group in order:
            if steps[-1] and sum(map(len, steps[-1])) + len(group) > batch:
                steps.append([])
            steps[-1].append(group)
    return [microbatches(step, microbatch) for step in steps]


# ---------------------------------------------------------------------------------------------
# Log-probabilities. R = responses, T = their longest, H = hidden size, N = their completion tokens

def piece_logps(model, responses):
    """log p of each completion token given all before it: fp32 (tokens,) for each response."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from losses import token_logps
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's
    width = max(map(length, responses))
    # Pads stand on the right, where causal attention never looks: no mask is needed.
    ids = torch.tensor([[*p, *c] + [0] * (width - len(p) - len(c)) for p, c in responses],
                       device=model.device)  # (R, T)
    where = [(r, t) for r, (p, c) in enumerate(responses) for t in range(len(p), len(p) + len(c))]
    row, at = torch.tensor(where, device=model.device).T  # (N,), (N,)
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (R, T, H)

    def score(hidden, ids):
        return token_logps(causal.get_output_embeddings()(hidden)[None], ids[None])[0]

    # The shift, here and nowhere else: what the model says at t - 1 scores the token at t.
    chunks = zip(hidden[row, at - 1].split(HEAD), ids[row, at].split(HEAD))
    # Checkpointed: the graph of all (N, vocabulary) logits would outweigh that of the model.
    logps = torch.cat([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks])
    return logps.split([len(completion) for _, completion in responses])


def pieces(responses, args):
    size = min(PIECE, args.microbatch)
    return [responses[i:i + size] for i in range(0, len(responses), size)]


def completion_logps(model, responses, args):
    """{response: (tokens,) log-probs}, a few responses at a time."""
    import torch
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        found = [piece_logps(model, piece) for piece in pieces(responses, args)]
    return dict(zip(responses, sum(found, ())))


def fingerprint(model, steps, args):
    """Hash of all that log-probs depend on: weights, token ids and how they are batched."""
    import torch
    plan = [[[row["responses"] for row in some] for some in step] for step in steps]
    found = hashlib.sha256(repr((args.dtype, model.device.type, args.microbatch, plan)).encode())
    for name, weight in model.state_dict().items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def reference_logps(model, steps, args, key):
    """completion_logps of all steps without a graph, kept beside OUT. A response counts where it
    comes first: policy and reference see the same batch there, so at step 0 they are equal."""
    import torch
    from safetensors.torch import load_file, save_file
    batches, found = [distinct(some) for step in steps for some in step], {}
    order = list(dict.fromkeys(response for batch in batches for response in batch))
    path = Path(args.out).parent / f"reference-{key[:16]}.safetensors"
    if not path.exists():
        with torch.no_grad():
            for batch in progress(batches, desc="reference", unit="batch"):
                if not found.keys() >= set(batch):
                    found = {**completion_logps(model, batch, args), **found}
        aside = f"{path}.{os.getpid()}.tmp"  # another run may want the same
        save_file({"logps": torch.cat([found[response] for response in order])}, aside)
        os.replace(aside, path)
    logps = load_file(path, device=str(model.device))["logps"]
    return dict(zip(order, logps.split([len(completion) for _, completion in order])))


# ---------------------------------------------------------------------------------------------
# One step

def losses_of(rows, policy, reference, args):
    """(losses, metrics) from {response: token log-probs} of policy and reference."""
    import torch
    from losses import dpo_loss, sft_loss
    if args.loss == "sft":  # as one long row: the sum over all tokens counts
        logps = torch.cat([policy[row["responses"][0]] for row in rows])[None]
        return sft_loss(logps, torch.ones_like(logps))
    columns = [torch.stack([logps[row["responses"][side]].sum() for row in rows])
               for logps in (policy, reference) for side in (0, 1)]
    return dpo_loss(*columns, beta=args.beta)


def step_loss(model, step, reference, args, learn):
    """(loss, metrics), means over the rows of a step (sft: its tokens), whatever the microbatches;
    with learn=True the gradient is added to the weights'. A group larger than a microbatch takes
    two passes: its log-probs without the model's graph and the loss's gradient in them; then,
    piece by piece, the model's graph with that gradient."""
    import torch
    rows = [row for some in step for row in some]
    tokens = sum(len(completion) for row in rows for _, completion in row["responses"])
    n = tokens if args.loss == "sft" else len(rows)
    total, metrics = 0.0, {}
    for some in step:
        responses = distinct(some)
        fits = len(responses) <= args.microbatch
        with torch.set_grad_enabled(learn and fits):
            policy = completion_logps(model, responses, args)
        if learn and not fits:
            policy = {r: logps.requires_grad_() for r, logps in policy.items()}
        losses, found = losses_of(some, policy, reference, args)
        total += losses.sum().item() / n
        for name, value in found.items():
            metrics[name] = metrics.get(name, 0.0) + value.item() * len(some) / len(rows)
        if learn:
            (losses.sum() / n).backward()
        for piece in pieces(responses, args) if learn and not fits else ():
            again = completion_logps(model, piece, args)
            torch.autograd.backward(list(again.values()), [policy[r].grad for r in again])
    return total, {"tokens": n} if args.loss == "sft" else metrics


def check_head(model, response):
    """Refuse a model whose logits are not its last hidden state times its output embeddings."""
    import torch
    from losses import token_logps
    prompt, completion = map(list, response)
    ids = torch.tensor([prompt + completion], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1:-1]
        gap = token_logps(logits, ids[:, len(prompt):])[0] - piece_logps(model, [response])[0]
    if gap.abs().mean() > (1e-3 if logits.dtype == torch.float32 else 0.1):
        die(f"this model's log-probs are not those of its last hidden state and output embeddings "
            f"(by {gap.abs().mean():.3g}): a scaled or soft-capped head is not supported")


# ---------------------------------------------------------------------------------------------
# The loop

def rate(step, n, warmup):
    """Share of the peak learning rate: linear up over warmup * n steps, then linear down to 0."""
    rising = int(warmup * n)
    return (step + 1) / (rising + 1) if step < rising else (n - step) / (n - rising)


def sweep(folder, pattern="step-*.pt", keep=0):
    for path in sorted(folder.glob(pattern), reverse=True)[keep:]:
        path.unlink()


def train(model, steps, held, reference, args, key, log):
    """Update the model in place, from the newest checkpoint beside the open log.jsonl on."""
    import torch
    folder, start, end_of_log = Path(log.name).parent, 0, 0
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0, fused=True)
    newest = max(folder.glob("step-*.pt"), default=None)
    if newest:
        state = torch.load(newest, map_location=model.device, weights_only=True)
        if state["key"] != key:
            die(f"{folder} was begun from another model, flags or rows to evaluate: --overwrite it")
        start, end_of_log = state["step"], state["end_of_log"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for weight, saved in zip(weights, state["weights"]):
                weight.copy_(saved)
    log.truncate(end_of_log)

    for number in progress(range(start, len(steps) + 1), unit="step"):
        if args.save_every and number % args.save_every == 0 and number > start:
            torch.save({"key": key, "step": number, "end_of_log": log.tell(),
                        "optimizer": optimizer.state_dict(), "weights": weights}, folder / "new")
            os.replace(folder / "new", folder / f"step-{number:07d}.pt")  # whole, or not there
            sweep(folder, keep=2)
        if held and (number % (args.eval_every or len(steps)) == 0 or number == len(steps)):
            loss, metrics = step_loss(model, held, reference, args, learn=False)
            row = {"step": number, "eval_loss": loss, **{f"eval_{k}": metrics[k] for k in metrics}}
            print(dumps(row), file=log, flush=True)
            right = f", {metrics['rewards/accuracies']:.1%} right" if reference and number else ""
            print(f"step {number}: held-out loss {loss:.4f}{right}")
        if number == len(steps):
            return
        lr = args.lr * rate(number, len(steps), args.warmup)
        loss, metrics = step_loss(model, steps[number], reference, args, learn=True)
        norm = torch.nn.utils.clip_grad_norm_(weights, args.clip).item()
        if not math.isfinite(loss + norm):
            sys.exit(f"step {number}: loss {loss:.4g} and gradient norm {norm:.4g} from the rows "
                     + ", ".join(row["id"] for some in steps[number] for row in some))
        if number == 0 and reference:
            print(f"step 0: loss {loss:.4f}; ln 2 = {math.log(2):.4f} where policy is reference")
            if abs(loss - math.log(2)) > (1e-3 if args.dtype == "float32" else 2e-2):
                sys.exit("step 0: the policy is not the reference before training")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        row = {"step": number, "epoch": round(number * args.epochs / len(steps), 4),
               "learning_rate": lr, "loss": loss, "grad_norm": norm, **metrics}
        print(dumps(row), file=log, flush=True)


def with_lora(model, args):
    """The model with a new adapter, which adds nothing yet: the policy starts as the reference."""
    import torch
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(args.seed)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear",
                                            r=args.lora_r, lora_alpha=args.lora_alpha))


def main():
    args = parse_args()
    rows = read_rows(args.inp, args.loss, args.limit)
    eval_rows = read_rows(args.eval_prefs, args.loss) if args.eval_prefs else []
    both = {row["prompt_id"] for row in rows} & {row["prompt_id"] for row in eval_rows}
    if both:
        die(f"{args.eval_prefs}: expected other prompts than --prefs, found {sorted(both)}")
    out, work = Path(args.out), Path(f"{Path(args.out)}.tmp")
    args.rows = len(rows)  # a flag to same_run: more rows are another plan
    for folder in (work, out):
        memo, text = same_run(folder, args, rows)
        if folder.exists() and not memo.exists():
            die(f"{folder} is there, and no run of this stage made it. Choose another --out")
    if out.exists() and not args.overwrite:
        sweep(out)
        print(f"{out} is finished: the same flags and rows made it")
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    dtype = "float32" if args.full else args.dtype
    model, tokenizer, _ = load_model(args.model, dtype=dtype, device=args.device)
    model = model if args.full else with_lora(model, args)
    rows = encode_rows(tokenizer, rows, args.max_length)
    held = encode_rows(tokenizer, eval_rows, args.max_length)
    if not rows or (eval_rows and not held):
        die(f"expected rows of at most {args.max_length} tokens (--max-length), found none")
    check_head(model, rows[0]["responses"][0])
    steps = plan(rows, args.batch, args.epochs, args.seed, args.microbatch)
    held = sum(plan(held, args.batch, 1, args.seed, args.microbatch), [])  # as one large step
    key = fingerprint(model, [*steps, held], args)
    reference = {} if args.loss == "sft" else reference_logps(model, [*steps, held], args, key)
    write_whole(f"{work}.args.json", text)
    work.mkdir(exist_ok=True)
    with open(work / "log.jsonl", "a", encoding="utf-8", newline="\n") as log:
        lock(log, out)
        if args.overwrite:
            sweep(work, "[!l]*")  # all but log.jsonl
        train(model, steps, held, reference, args, key + text, log)
        (model.bfloat16() if args.full else model).save_pretrained(work)
        tokenizer.save_pretrained(work)
        told = shlex.join(["python", "05_train.py", *sys.argv[1:]])
        card = f"---\nbase_model: {args.model}\n---\n\n    {told}\n\n    {text}"
        write_whole(work / "README.md", card)
        shutil.rmtree(f"{work}.old", ignore_errors=True)
        if out.exists():  # --overwrite; never a moment with half of a model in OUT
            out.rename(f"{work}.old")
        write_whole(f"{out}.args.json", text)
        work.rename(out)
    Path(f"{work}.args.json").unlink()
    shutil.rmtree(f"{work}.old", ignore_errors=True)
    sweep(out)
    report(rows_in=args.rows, trained_on=len(rows), left_out=args.rows - len(rows),
           steps=len(steps), held_out=sum(map(len, held)))
    return 0


if __name__ == "__main__":
    run(main)
