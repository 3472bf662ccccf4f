"""
Stage 5. Train a model on 04's rows with a loss of losses.py.

Reads   prefs.jsonl, in TRL's form, anybody's will do: ROW below shows all that a row may hold. Each
        has a prompt; for dpo, ipo, rso and cpo chosen and rejected, for the other losses a
        completion; for kto and factalign a label, and for factalign, where annotated, sentences
Writes  OUT/   a LoRA adapter, or with --full or --merge all weights, in --dtype, as transformers,
               peft and vLLM load it; the tokenizer; README.md, the card; log.jsonl, TRL's names:
  {"step": 0, "epoch": 0.0, "learning_rate": 5e-06, "loss": 0.6931, "grad_norm": 21.4,
   "rewards/margins": 0.0, ...}   and rows of held-out figures, with "eval_" in front

Prompt and completion are tokenised apart and joined; the end-of-turn token ends a completion, and
is trained on, only where finish is "stop". All steps are planned before the first: about --batch
rows, all pairs of a prompt together. A response goes through the model once a step, however many
pairs share it, and only its completion meets the LM head. The reference's log-probs are kept beside
OUT under a hash of all that they depend on. Killed anywhere, the same command ends with the same
weights: OUT holds two checkpoints until it is done. Trained weights are fp32 under bf16 autocast:
in bf16, AdamW's updates would be lost to rounding. Processes share out each step: its gradient is
the same.

Not as in the papers: FactTune trains with RMSprop at lr 5e-7 (--optim), after an SFT stage.
Not yet: a model sharded over GPUs; scaled heads; thoughts before an answer (templates are told
enable_thinking=False). Several processes were run on CPUs only; --batch is that of all of them,
--microbatch of each.
CPU, a minute:   python 05_train.py --prefs runs/demo/prefs.jsonl --out runs/demo/lora --lr 1e-4
Two GPUs:        accelerate launch --multi_gpu --num_processes 2 05_train.py --batch 32 \\
                     --prefs runs/x/prefs.jsonl --out runs/x/tuned --model Qwen/Qwen2.5-3B-Instruct
"""
import hashlib
import json
import math
import os
import random
import shlex
import sys
import tempfile
from pathlib import Path

from common import (arguments, as_messages, die, digest, dumps, end_of_turn, load_model, lock,
                    progress, prompt_ids, read_jsonl, report, run, same_run, write_whole)

PAIRS = ("dpo", "ipo", "rso", "cpo")
KTO = ("kto", "factalign")
SENTENCES = ("sentence_label", "completion_sentences", "sentence_spans")
RANK = int(os.environ.get("RANK", 0))  # of this process among RANKS, as accelerate or torchrun say
RANKS = int(os.environ.get("WORLD_SIZE", 1))
HEAD = 256  # completion positions that meet the LM head at once


def parse_args():
    p = arguments(__doc__, inp="--prefs")
    add = p.add_argument
    add("--eval-prefs", metavar="FILE", help="rows of other prompts, to evaluate on")
    add("--max-length", type=int, default=1024, help="leave out rows with more tokens (TRL: 1024)")
    add("--model", default="data/world/model", help="a folder or a hub name")
    add("--adapter", metavar="DIR", help="go on with this LoRA adapter of --model")
    add("--ref", default="start", help="reference: the policy at its start (FactAlign), or base: "
        "--model itself, or another model or adapter")
    add("--full", action="store_true", help="train all weights, not a LoRA adapter")
    add("--merge", action="store_true", help="save model and adapter as one")
    add("--lora-r", type=int, default=16, help="rank of the adapter, on all linear layers")
    add("--lora-alpha", type=int, default=32, help="its scale is alpha / r")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="autocast's type")
    add("--loss", default="dpo", choices=[*PAIRS, "kto", "factalign", "sft"], help="of losses.py")
    add("--beta", type=float, default=0.1, help="pull to the reference (DPO's, KTO's own: 0.1)")
    add("--label-smoothing", type=float, default=0.0, help="dpo: share of flipped labels")
    add("--alpha", type=float, default=1.0, help="cpo: weight of the likelihood (TRL: 1)")
    add("--desirable-weight", type=float, default=1.0, help="kto, factalign")
    add("--undesirable-weight", type=float, default=1.0, help="kto, factalign")
    add("--lam", type=float, default=2.0, help="factalign: weight of the sentences (paper: 2)")
    add("--sentence-beta", type=float, default=0.5, help="factalign: their beta (paper: 0.5)")
    add("--sentence-desirable-weight", type=float, default=1.0, help="factalign")
    add("--sentence-undesirable-weight", type=float, default=1.0, help="factalign")
    add("--kind-weights", metavar="KIND=W,...", type=lambda text: {
        kind: float(w) for kind, w in (word.split("=") for word in text.split(","))},
        default={}, help="weights of kinds of rows, of the others 1 (APEFT; ours)")
    add("--halves", action="store_true", help="equal parts of each kind a step (FLAME)")
    add("--optim", default="adamw", choices=["adamw", "adamw8bit", "rmsprop"])
    add("--lr", type=float, default=1e-5, help="peak rate (LoRA: to 1e-4; all of 1B: 1e-6)")
    add("--schedule", default="linear", choices=["linear", "cosine", "constant"], help="its fall")
    add("--warmup", type=float, default=0.1, help="share of steps in which the rate rises")
    add("--clip", type=float, default=1.0, help="largest gradient norm (TRL: 1)")
    add("--epochs", type=int, default=1, help="passes over the rows")
    add("--batch", type=int, default=8, help="rows a step (FactAlign 16, FLAME 64)")
    add("--microbatch", type=int, default=64, help="responses whose graph fits into memory")
    add("--gradient-checkpointing", action="store_true", help="keep less of the graph, slower")
    add("--save-every", type=int, default=50, metavar="STEPS", help="checkpoint (0: never)")
    add("--eval-every", type=int, default=0, metavar="STEPS", help="(0: before and after)")
    args = p.parse_args()
    may_be_0 = ("seed", "label_smoothing", "alpha", "lam", "warmup", "save_every", "eval_every")
    weights = [("kind_weights", weight) for weight in args.kind_weights.values()]
    for flag, value in [*vars(args).items(), *weights]:
        least = "at least" if flag in may_be_0 else "above"
        if type(value) in (int, float) and (value < 0 or value == 0 and least == "above"):
            die(f"expected --{flag.replace('_', '-')} {least} 0, found {value}")
    if not (args.warmup < 1 and args.label_smoothing < 0.5 and args.lora_r <= 64):
        die("expected --warmup < 1, --label-smoothing < 0.5, --lora-r <= 64 (vLLM's)")
    if args.adapter and not (Path(args.adapter) / "adapter_config.json").exists():
        die(f"{args.adapter}: expected a folder with a LoRA adapter, found no adapter_config.json")
    if (Path(args.model) / "adapter_config.json").exists():  # peft would put a new one in its place
        die(f"{args.model} is an adapter: expected its base as --model and itself as --adapter")
    if args.optim == "adamw8bit":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            die("--optim adamw8bit needs the package bitsandbytes")
    if args.kind_weights and args.loss in ("sft", "factalign"):
        die(f"--kind-weights weigh the rows of the other losses, not of {args.loss}")
    return args


# ---------------------------------------------------------------------------------------------
# Rows and tokens

ROW = {  # a pair has chosen and rejected, a single response is a completion
    "prompt": [{"role": "user", "content": "Where is Fiji?"}],
    "chosen": [{"role": "assistant", "content": "In Oceania."}],
    "rejected": [{"role": "assistant", "content": "In Asia."}],
    "completion": [{"role": "assistant", "content": "It is a state. It is in Asia."}],
    "prefix": "It is",  # the completions begin with it, and are trained on from there
    "label": True,
    "completion_sentences": ["It is a state.", "It is in Asia."],
    "sentence_label": [True, False],
    "sentence_spans": [[0, 14], [15, 29]],  # characters [start, end); without them: searched
    "finish": "stop",  # or "length"; of a pair {"chosen": ..., "rejected": ...}; unsaid: stop
    "prompt_id": "fiji-geo",
    "kind": "fact"}


def sides(loss):
    return ("chosen", "rejected") if loss in PAIRS else ("completion",)


def finish(row, side):
    found = row.get("finish", "stop")
    return found.get(side, "stop") if isinstance(found, dict) else found


def like(value, example):
    """Whether a value is of the example's type, all through its lists and dictionaries."""
    if type(value) is not type(example):
        return False
    if type(example) is list:
        return all(like(item, example[0]) for item in value)
    return type(example) is not dict or all(like(value.get(k), example[k]) for k in example)


def lacks(row, loss):
    """What is expected of a row and not there; None where all is."""
    needed = (*sides(loss), *["label"] * (loss in KTO))
    for name, example in ROW.items():
        missing = row.get(name) is None and name not in needed
        if not (missing or name in ("prompt", "finish") or like(row.get(name), example)):
            return f"{name!r} like {dumps(example)}"
    for side in sides(loss):
        if (len(row[side]) != 1 or finish(row, side) not in ("stop", "length")
                or not row[side][0]["content"].startswith(row.get("prefix") or "")):
            return f"one message as {side!r}, 'finish' stop or length, any 'prefix' its beginning"
    lengths = [len(row.get(name) or []) for name in SENTENCES]
    if {*lengths} - {0, lengths[0]} or (lengths[0] and (row.get("prefix") or not any(lengths[1:]))):
        return f"{' and '.join(map(repr, SENTENCES))} of one length, and no 'prefix'"
    end = 0
    for span in row.get("sentence_spans") or [] if loss == "factalign" else []:
        if len(span) != 2 or not end <= span[0] < span[1] <= len(row["completion"][0]["content"]):
            return "'sentence_spans' as [start, end] inside the completion, one after the other"
        end = span[1]


def encode(tokenizer, prompt, text, finish, prefix=""):
    """(prompt ids, completion ids), tuples: equal responses are one key of a dictionary."""
    # A response that spells out "<|im_end|>" does not end its turn by it: split_special_tokens.
    ids = tokenizer(text.removeprefix(prefix), add_special_tokens=False, split_special_tokens=True)
    end = [end_of_turn(tokenizer)] if finish == "stop" else []
    return tuple(prompt_ids(tokenizer, prompt, prefix)), (*ids["input_ids"], *end)


def sentence_ids(tokenizer, text, spans):
    """For each token of `text` the number of the (start, end) span that its first character other
    than space lies in, -1 for none: a token " The" opens the sentence of "The"."""
    coded = tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                      return_offsets_mapping=True)
    firsts = [b - len(text[a:b].lstrip()) for a, b in coded["offset_mapping"]]
    return [next((n for n, (start, end) in enumerate(spans) if start <= first < end), -1)
            for first in firsts]


def search(sentences, text):
    """[(start, end)] of sentences in a text from left to right; (0, 0) of one that is not there."""
    spans, end = [], 0
    for sentence in map(str.strip, sentences):
        start = text.find(sentence, end)
        spans.append((start, start + len(sentence)) if start >= 0 else (0, 0))
        end = max(end, spans[-1][1])
    return spans


def encode_rows(tokenizer, rows, args):
    """Rows {"id", "prompt_id", "kind", "label", "responses": [as `encode` gives them], "sentences":
    their labels, "sentence_ids": for each completion token the number of its sentence or -1}. A
    label speaks of the whole text: a response that is too long leaves its row out, uncut."""
    found = []
    for row in rows:
        prompt, text = as_messages(row["prompt"]), row[sides(args.loss)[0]][0]["content"]
        responses = [encode(tokenizer, prompt, row[side][0]["content"], finish(row, side),
                            row.get("prefix") or "") for side in sides(args.loss)]
        if not all(c and len(p + c) <= args.max_length for p, c in responses):
            continue
        labels, ids = row.get("sentence_label") if args.loss == "factalign" else [], []
        if labels:
            spans = row.get("sentence_spans") or search(row["completion_sentences"], text)
            ids = sentence_ids(tokenizer, text, spans)
        kept = sorted({*ids} - {-1})  # a sentence without a token has no log-probability
        ids += [-1] * (len(responses[0][1]) - len(ids))
        found.append({"id": row["id"], "prompt_id": row.get("prompt_id") or dumps(row["prompt"]),
                      "kind": row.get("kind") or "", "label": row.get("label"),
                      "responses": responses, "sentences": [labels[n] for n in kept],
                      "sentence_ids": [kept.index(n) if n >= 0 else -1 for n in ids]})
    return found


# ---------------------------------------------------------------------------------------------
# The plan: a step is a list of rows

def distinct(rows):
    """The responses of some rows, each once, by length."""
    found = {response for row in rows for response in row["responses"]}
    return sorted(found, key=lambda response: (sum(map(len, response)), response))


def drawn(groups, rows, n, rng, whole):
    """n steps of rows in random order, evenly filled, `rows` in all; what is less goes round. Pairs
    of a prompt share responses and stay together, whole; single responses to it are dealt out."""
    steps, before = [[] for _ in range(n)], 0
    while before < rows:
        rng.shuffle(groups)
        for group in groups if whole else [[row] for group in groups for row in group]:
            if before < rows:
                steps[before * n // rows if whole else before % n].append(group)
                before += len(group)
    return steps


def mismatched(rows):
    """KTO: each row of a step with "other", a row of its prompt and the completion of another: the
    rotation by the smallest shift that never meets the same prompt, of the rows as they come or
    else sorted by prompt, which leaves none only where one prompt has more than half of them."""
    for order in (rows, sorted(rows, key=lambda row: row["responses"])):
        for shift in range(1, len(rows)):
            pairs = [(row, row["responses"][0][0], other, *other["responses"][0])
                     for row, other in zip(order, order[shift:] + order[:shift])]
            if all(prompt != theirs for _, prompt, _, theirs, _ in pairs):
                return [{**row, "other": {**other, "responses": [(prompt, completion)]}}
                        for row, prompt, other, _, completion in pairs]
    die(f"KTO needs responses to other prompts in a step; most of these {len(rows)} answer one: "
        + ", ".join(row["id"] for row in rows) + ". Take more prompts or a larger --batch")


def plan(rows, args, batch, epochs, halves=False):
    """All steps: a pure function, so resuming needs the number of a step and no more. halves: each
    kind of row has an equal part of each step; the kinds with fewer rows go round."""
    rng, kinds, steps = random.Random(args.seed), {}, []
    for row in rows:
        kind = kinds.setdefault(halves and row["kind"], {})
        kind.setdefault(row["prompt_id"], []).append(row)
    kinds = [list(groups.values()) for groups in kinds.values()]
    most = max(sum(map(len, groups)) for groups in kinds)
    n = math.ceil(most * len(kinds) / batch)
    if args.loss in KTO:  # no step of one row
        n = min(n, max(1, most * len(kinds) // 2))
    for _ in range(epochs):
        parts = [drawn(groups, most, n, rng, args.loss in PAIRS) for groups in kinds]
        steps += [sum(step, []) for step in zip(*parts) if any(step)]
    if args.loss in KTO:
        steps = [[[row] for row in mismatched(sum(step, []))] for step in steps]
    for step in steps:
        step.sort(key=lambda group: max(len(p + c) for row in group for p, c in row["responses"]))
    return [sum(step, []) for step in steps]


# ---------------------------------------------------------------------------------------------
# Log-probabilities. R = responses, T = their longest, H = hidden size, N = their completion tokens

def piece_logps(model, responses):
    """log p of each completion token given all before it: fp32 (tokens,) for each response."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.checkpoint import checkpoint
    from losses import token_logps
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's
    # Pads stand on the right, where causal attention never looks: no mask is needed.
    ids = pad_sequence([torch.tensor(p + c, device=model.device) for p, c in responses],
                       batch_first=True)  # (R, T)
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (R, T, H)
    # The shift, here and nowhere else: what the model says at t - 1 scores the token at t.
    hidden = torch.cat([h[len(p) - 1:][:len(c)] for h, (p, c) in zip(hidden, responses)])  # (N, H)
    tokens = torch.cat([t[len(p):][:len(c)] for t, (p, c) in zip(ids, responses)])  # (N,)

    cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2's

    def score(hidden, tokens):
        logits = causal.get_output_embeddings()(hidden)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return token_logps(logits[None], tokens[None])[0]

    chunks = zip(hidden.split(HEAD), tokens.split(HEAD))
    # Checkpointed: the graph of all (N, vocabulary) logits would outweigh that of the model.
    logps = torch.cat([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks])
    return logps.split([len(completion) for _, completion in responses])


def completion_logps(model, responses, args):
    """{response: (tokens,) log-probs}. Each process computes a share of them, and is told the rest.
    Where a share outnumbers --microbatch no graph is kept: a piece is computed again when the
    gradient comes to it, which is exact, whatever the size."""
    import torch
    from accelerate.utils import gather_object
    from torch.utils.checkpoint import checkpoint
    share = responses[RANK::RANKS]
    # Neighbours in length: 13 % of a piece of 4 are pads, 27 % of 8; a GPU prefers full pieces.
    size = min(4 if model.device.type == "cpu" else 64, args.microbatch)
    pieces = [share[i:i + size] for i in range(0, len(share), size)]
    again = len(share) > args.microbatch and torch.is_grad_enabled()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        found = [checkpoint(piece_logps, model, piece, use_reentrant=False) if again else
                 piece_logps(model, piece) for piece in pieces]
    own = dict(zip(share, sum(found, ())))
    if RANKS == 1:
        return own
    parts = gather_object([{response: logps.detach().cpu() for response, logps in own.items()}])
    told = {response: logps for part in parts for response, logps in part.items()}
    return {response: logps.to(model.device) for response, logps in told.items()} | own


def others(rows):
    return [row["other"] for row in rows if "other" in row]


def fingerprint(model, steps, args):
    """Hash of all that log-probs depend on: weights, token ids and how they are batched."""
    import torch
    plan = [[distinct(some)[rank::RANKS] for some in (rows, others(rows))]
            for rows in steps for rank in range(RANKS)]
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
    path, found = Path(args.out).parent / f"reference-{key[:16]}.safetensors", {}
    order = distinct([row for rows in steps for row in rows + others(rows)])
    if path.exists():
        logps = load_file(path, device=str(model.device))["logps"]
        return dict(zip(order, logps.split([len(completion) for _, completion in order])))
    for rows in progress(steps, desc="reference", unit="step"):
        for batch in (distinct(rows), distinct(others(rows))):
            if not found.keys() >= set(batch):
                with torch.no_grad():
                    found = {**completion_logps(model, batch, args), **found}
    if RANK == 0:
        aside = f"{path}.{Path(args.out).name}.tmp"  # another run may want the same
        save_file({"logps": torch.cat([found[response] for response in order])}, aside)
        os.replace(aside, path)
    return found


# ---------------------------------------------------------------------------------------------
# One step

def losses_of(rows, policy, reference, args):
    """(loss, metrics) of a whole step, from {response: token log-probs} of policy and reference."""
    import torch
    import losses
    device = next(iter(policy.values())).device

    def scores(logps, rows=rows):  # (B,) for each side: sums of log-probs, for ipo their means
        reduce = torch.mean if args.loss == "ipo" else torch.sum
        return [torch.stack([reduce(logps[response]) for response in side])
                for side in zip(*(row["responses"] for row in rows))]

    def sentences(logps, rows=rows):  # (M,)
        return torch.cat([losses.sentence_sums(
            logps[row["responses"][0]][None], torch.tensor([row["sentence_ids"]], device=device),
            len(row["sentences"])) for row in rows])

    if args.loss == "sft":  # as one long row: the sum over all tokens counts
        logps = torch.cat([policy[row["responses"][0]] for row in rows])[None]
        nll, metrics = losses.sft_loss(logps, torch.ones_like(logps))
        return nll.sum() / metrics["tokens"], metrics
    if args.loss == "dpo":
        found, metrics = losses.dpo_loss(*scores(policy), *scores(reference), args.beta,
                                         args.label_smoothing)
    elif args.loss == "ipo":
        found, metrics = losses.ipo_loss(*scores(policy), *scores(reference), args.beta)
    elif args.loss == "rso":
        found, metrics = losses.rso_loss(*scores(policy), *scores(reference), args.beta)
    elif args.loss == "cpo":
        chosen, rejected = scores(policy)
        nll = -chosen * len(rows) / sum(len(row["responses"][0][1]) for row in rows)
        found, metrics = losses.cpo_loss(chosen, rejected, nll, args.beta, args.alpha)
    else:
        (now,), (before,) = scores(policy), scores(reference)
        label = torch.tensor([row["label"] for row in rows], device=device)
        z0 = losses.kl_estimate(*scores(policy, others(rows)), *scores(reference, others(rows)))
        found, metrics = losses.kto_loss(now - before, label, z0, args.beta,
                                         args.desirable_weight, args.undesirable_weight)
    if args.loss == "factalign":
        label = torch.tensor([mark for row in rows for mark in row["sentences"]], device=device)
        number = torch.tensor([b for b, row in enumerate(rows) for _ in row["sentences"]],
                              device=device, dtype=torch.long)
        z0 = losses.kl_estimate(sentences(policy, others(rows)), sentences(reference, others(rows)))
        parts, more = losses.fkto_loss(
            sentences(policy) - sentences(reference), label, number, z0, args.sentence_beta,
            args.sentence_desirable_weight, args.sentence_undesirable_weight)
        return losses.factalign_loss(found, parts, args.lam), {**metrics, **more}
    kinds = [row["kind"] for row in rows]
    weights = {kind: args.kind_weights.get(kind, 1.0) for kind in kinds}
    return losses.mix(found, kinds, weights), metrics


def step_loss(model, rows, reference, args):
    """(loss, metrics) of a step, with a graph where gradients are on: of what this process has
    computed, so that its gradient is its part of the step's."""
    import torch
    with torch.no_grad():
        policy = completion_logps(model, distinct(others(rows)), args)
    policy |= completion_logps(model, distinct(rows), args)
    return losses_of(rows, policy, reference, args)


def check_head(model, response):
    """Refuse a model whose logits are something else than what `piece_logps` makes of its last
    hidden state and output embeddings."""
    import torch
    from losses import token_logps
    prompt, completion = map(list, response)
    ids = torch.tensor([prompt + completion], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1:-1]
        gap = token_logps(logits, ids[:, len(prompt):])[0] - piece_logps(model, [response])[0]
    if gap.abs().mean() > (1e-3 if logits.dtype == torch.float32 else 0.1):
        die(f"this model's log-probs are not those of its last hidden state and output embeddings "
            f"(by {gap.abs().mean():.3g}): a scaled head is not supported")


# ---------------------------------------------------------------------------------------------
# The loop

def rate(step, n, args):
    """Share of the peak learning rate: linear up over warmup * n steps, then as --schedule says."""
    rising = int(args.warmup * n)
    left = (n - step) / (n - rising)  # 1 ... 0
    fall = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
    return (step + 1) / (rising + 1) if step < rising else fall[args.schedule]


def sweep(folder, pattern="step-*.pt", keep=0):
    for path in sorted(folder.glob(pattern), reverse=True)[keep:]:
        path.unlink()


def weigh(what, labels, true_weight, false_weight):
    """Advice for KTO: weight x count of one label at most 4/3 of the other's."""
    true, false = labels.count(True) * true_weight, labels.count(False) * false_weight
    if 3 * max(true, false) > 4 * min(true, false):
        print(f"{what}: weight x count is {true:g} where the label is true, {false:g} where it is "
              "false: more than 4 to 3", file=sys.stderr)


def train(model, steps, held, reference, args, key, folder, log):
    """Update the model in place, from the newest checkpoint in `folder` on."""
    import torch
    weights, start, end_of_log = [w for w in model.parameters() if w.requires_grad], 0, 0
    if args.optim == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit
        optimizer = AdamW8bit(weights, weight_decay=0.0)
    elif args.optim == "rmsprop":
        optimizer = torch.optim.RMSprop(weights)
    else:
        optimizer = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
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
        del state, saved  # as large as the model, or twice
    log.truncate(end_of_log)

    for number in progress(range(start, len(steps) + 1), unit="step"):
        if args.save_every and number % args.save_every == 0 and number > start and RANK == 0:
            try:
                torch.save({"key": key, "step": number, "end_of_log": log.tell(),
                            "optimizer": optimizer.state_dict(), "weights": weights},
                           folder / "new")
            except RuntimeError as error:  # its word for a full disk
                raise OSError(f"{folder / 'new'}: cannot be written: {error!r:.200}") from None
            os.replace(folder / "new", folder / f"step-{number:07d}.pt")  # whole, or not there
            sweep(folder, keep=2)
        if held and (number % (args.eval_every or len(steps)) == 0 or number == len(steps)):
            with torch.no_grad():
                loss, metrics = step_loss(model, held, reference, args)
            row = {f"eval_{k}": v.item() for k, v in {"loss": loss, **metrics}.items()}
            print(dumps({"step": number, **row}), file=log, flush=True)
            print(f"step {number}: held-out loss {loss:.4f}")
        if number == len(steps):
            return
        loss, metrics = step_loss(model, steps[number], reference, args)
        if number == 0 and reference and args.ref == "start":
            start_loss, _ = losses_of(steps[0], reference, reference, args)
            print(f"step 0: loss {loss:.4f}; {start_loss:.4f} where policy is reference")
            if abs(loss - start_loss) > (1e-3 if args.dtype == "float32" else 2e-2):
                sys.exit("step 0: the policy is not the reference before training")
        if loss.requires_grad:  # a process may have no response
            loss.backward()
        for weight in weights if RANKS > 1 else ():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.distributed.all_reduce(weight.grad)
        norm = torch.nn.utils.clip_grad_norm_(weights, args.clip).item()
        if not math.isfinite(loss.item() + norm):
            sys.exit(f"step {number}: loss {loss:.4g} and gradient norm {norm:.4g} from the rows "
                     + ", ".join(row["id"] for row in steps[number]))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(number, len(steps), args)
        optimizer.step()
        optimizer.zero_grad()
        row = {"step": number, "epoch": round(number * args.epochs / len(steps), 4),
               "learning_rate": group["lr"], "loss": loss.item(), "grad_norm": norm}
        print(dumps({**row, **{k: v.item() for k, v in metrics.items()}}), file=log, flush=True)


def policy_of(args, device):
    """(model to train, tokenizer). A new adapter adds nothing yet: the policy starts as --model."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    dtype = "float32" if args.full else args.dtype
    model, tokenizer, _ = load_model(args.model, dtype=dtype, device=device)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
        model = model.merge_and_unload().requires_grad_() if args.full else model
    elif not args.full:
        torch.manual_seed(args.seed)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear",
                                                 r=args.lora_r, lora_alpha=args.lora_alpha))
    model.eval()  # no dropout anywhere
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():  # it happens in layers that believe they train
            module.training = hasattr(module, "gradient_checkpointing")
    return model, tokenizer


def main():
    args = parse_args()
    given, given_held = [read_jsonl(path, {"prompt": (str, list)}, made_by="04_build_prefs.py",
                                    parts=lambda row: lacks(row, args.loss)) if path else []
                         for path in (args.inp, args.eval_prefs)]
    given, out = given[:args.limit], Path(args.out)
    # Flags to same_run: what else makes another run.
    args.rows, args.held, args.processes = len(given), digest(given_held), RANKS
    for path in Path(args.adapter or "/dev/null").glob("*.safetensors"):
        args.adapter_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    unknown = args.kind_weights.keys() - {row.get("kind") for row in given}
    if unknown:
        die(f"{args.inp}: expected rows of each of --kind-weights, found no {sorted(unknown)}")
    card = out / "README.md"
    if not card.exists() and not [*out.glob("step-*.pt")]:
        args.overwrite = True  # nothing is learnt yet: other flags may begin anew
    if out.exists() and not (out.is_dir() and Path(f"{out}.args.json").exists()):
        die(f"{out} is there, and no run of this stage made it. Choose another --out")
    memo, text = same_run(out, args, given)
    if RANK:
        sys.stdout = open(os.devnull, "w")
    if (card.exists() and not args.overwrite
            and json.loads(memo.read_text(encoding="utf-8")).get("finished")):
        sweep(out)
        print(f"{out} is finished: the same flags and rows made it")
        return 0

    from accelerate import PartialState
    processes = PartialState(cpu=args.device == "cpu")
    model, tokenizer = policy_of(args, args.device if RANKS == 1 else processes.device)
    rows, held = (encode_rows(tokenizer, some, args) for some in (given, given_held))
    both = {row["prompt_id"] for row in rows} & {row["prompt_id"] for row in held}
    if both:
        die(f"{args.eval_prefs}: expected other prompts than --prefs, found {sorted(both)}")
    if not rows or given_held and not held:
        die(f"expected rows of at most {args.max_length} tokens (--max-length), found none")
    if args.loss == "factalign" and not any(row["sentences"] for row in rows):
        die(f"{args.inp}: expected rows with sentences ({', '.join(SENTENCES)}), found none")
    check_head(model, rows[0]["responses"][0])
    if args.loss in KTO:
        weigh("rows", [r["label"] for r in rows], args.desirable_weight, args.undesirable_weight)
        weigh("sentences", sum((row["sentences"] for row in rows), []),
              args.sentence_desirable_weight, args.sentence_undesirable_weight)
    steps = plan(rows, args, args.batch, args.epochs, args.halves)
    held_step = plan(held, args, len(held), 1) if held else []  # one large step
    key, reference = fingerprint(model, steps + held_step, args), {}
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.loss not in ("sft", "cpo"):
        adapter = args.ref if (Path(args.ref) / "adapter_config.json").exists() else None
        name = args.model if adapter or args.ref == "base" else args.ref
        ref = model if args.ref == "start" else load_model(
            name, adapter, "float32" if args.full else args.dtype, model.device)[0]
        ref_key = key if ref is model else fingerprint(ref, steps + held_step, args)
        reference = reference_logps(ref, steps + held_step, args, ref_key)
        del ref  # or its weights would stay in memory to the end

    if RANK == 0 and not out.exists():
        write_whole(memo, text)  # a folder without it would be somebody else's
        out.mkdir()
    with (open(out / "log.jsonl", "a", encoding="utf-8", newline="\n") if RANK == 0 else
          tempfile.TemporaryFile("w")) as log:
        lock(log, out)
        if RANK == 0:
            if args.overwrite or not [*out.glob("step-*.pt")]:
                card.unlink(missing_ok=True)  # first: it says that the rest is there
                sweep(out, "[!l]*")  # all but log.jsonl
            write_whole(memo, text)
        processes.wait_for_everyone()
        train(model, steps, sum(held_step, []), reference, args, key + text, out, log)
        processes.destroy_process_group()
        if RANK:
            os._exit(0)  # the usual way out can abort in a thread of torch.distributed
        model = model.merge_and_unload() if args.merge and not args.full else model
        whole = (args.full or args.merge) and args.dtype == "bfloat16"
        (model.bfloat16() if whole else model).save_pretrained(out)
        tokenizer.save_pretrained(out)
        told = shlex.join(["python", "05_train.py", *sys.argv[1:]])
        write_whole(card, f"---\nbase_model: {args.model}\n---\n\n    {told}\n\n    {text}")
        write_whole(memo, dumps({**json.loads(text), "finished": True}) + "\n")
        sweep(out)
    report(rows_in=len(given), trained_on=len(rows), left_out=len(given) - len(rows),
           sentences_in=sum(len(row.get("sentence_label") or []) for row in given),
           sentences=sum(len(row["sentences"]) for row in rows), steps=len(steps),
           held_out=len(held))
    if RANKS > 1:
        sys.stdout.flush()
        os._exit(0)
    return 0


if __name__ == "__main__":
    run(main)
