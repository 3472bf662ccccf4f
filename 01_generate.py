"""
Stage 1. Sample n responses for every prompt from a local model.

Reads   prompts.jsonl   {"id", "topic", "prompt": str or [messages], ...}; a "prefix" continues the
                        assistant's text instead of starting it (FactTune's entity variant)
Writes  samples.jsonl   the prompt's row n times, and what was said:
  {"topic": "Albania", "prompt": "In three sentences, ...", "id": "albania-geo/3",
   "prompt_id": "albania-geo", "response": "Albania is a country in ...", "finish": "stop",
   "gen": {"model": "data/world/model", "adapter": null, "temperature": 0.8, "top_p": 0.95,
           "top_k": 0, "max_new_tokens": 192, "seed": 0}}
  finish is "length" when the budget of tokens ran out before the model ended its turn.

Sampling is written out below: temperature, then top-k, then top-p, then one draw. Each prompt goes
through the model once; its cache is repeated for the n responses, and finished responses leave the
batch. Batches are cut from the whole plan and seeded by (seed, number of the batch), so a resumed
file is the same file.

Not as in the papers: FactTune samples at T 1.0 and FLAME at T 0.7; here the defaults are those of
data/protocol.json.

CPU, 2 minutes:  python 01_generate.py --prompts data/prompts_dev.jsonl \\
                     --out runs/dev/samples.jsonl --n 4 --limit 26
One GPU:         python 01_generate.py --prompts data/prompts_train.jsonl \\
                     --out runs/x/samples.jsonl --n 10 --temperature 1.0 --batch 512 \\
                     --model HuggingFaceTB/SmolLM2-1.7B-Instruct
"""
import json
from pathlib import Path

from common import (arguments, as_messages, die, load_model, output, progress, prompt_ids,
                    read_jsonl, report, run)

PROTOCOL = json.loads((Path(__file__).parent / "data/protocol.json").read_text(encoding="utf-8"))


def parse_args():
    p = arguments(__doc__, inp="--prompts")
    # Model
    p.add_argument("--model", default="data/world/model",
                   help="a folder or a hub name (default: the embedded world's)")
    p.add_argument("--adapter", metavar="DIR", help="a PEFT adapter trained by 05")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"],
                   help="bfloat16 is the faster one on CPUs that know it")
    p.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    # Sampling: the protocol's values (data/protocol.json)
    p.add_argument("--n", type=int, default=PROTOCOL["sampled"]["n"], help="responses a prompt")
    p.add_argument("--temperature", type=float, default=PROTOCOL["sampled"]["temperature"],
                   help="0 is greedy")
    p.add_argument("--top-p", type=float, default=PROTOCOL["top_p"], help="nucleus; 1 is off")
    p.add_argument("--top-k", type=int, default=PROTOCOL["top_k"], help="0 is off")
    p.add_argument("--max-new-tokens", type=int, default=PROTOCOL["max_new_tokens"])
    p.add_argument("--batch", type=int, default=64, help="responses sampled side by side")
    args = p.parse_args()
    if args.n < 1 or args.batch < 1 or args.max_new_tokens < 1:
        die("--n, --batch and --max-new-tokens must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
        die("expected --temperature >= 0, 0 < --top-p <= 1, --top-k >= 0")
    if args.temperature == 0 and args.n > 1:
        die(f"--temperature 0 gives one response, {args.n} times: use --n 1")
    return args


# ---------------------------------------------------------------------------------------------
# Sampling. B = responses in the batch, V = vocabulary

def next_tokens(logits, temperature, top_p, top_k, generator):
    """Draw one token a row. logits (B, V), any float dtype -> ids (B,)."""
    import torch
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        floor = scaled.topk(top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    probs = scaled.softmax(-1)
    if top_p < 1:
        ordered, where = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens: 0 for the first
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, where, ordered)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def sample_batch(model, prompts, n, sampling, max_new_tokens, stop_ids, pad_id, seed):
    """n responses for each of `prompts` (lists of token ids).

    Returns [(token ids without the end of turn, finish)]: prompt 0 sample 0, sample 1, ...
    """
    import torch
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    width = max(map(len, prompts))
    # Left padding: every prompt ends, and every response begins, in the same column
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True,
                logits_to_keep=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(n)
    logits, mask = (t.repeat_interleave(n, 0) for t in (out.logits[:, -1], mask))
    position = position[:, -1].repeat_interleave(n)
    said = [[] for _ in range(len(prompts) * n)]
    finish = ["length"] * len(said)
    alive = torch.arange(len(said), device=device)  # which response each row of the batch is
    for _ in range(max_new_tokens):
        ids = next_tokens(logits, *sampling, generator)
        keep = [j for j, token in enumerate(ids.tolist()) if token not in stop_ids]
        rows = alive.tolist()
        for j in set(range(len(rows))) - set(keep):
            finish[rows[j]] = "stop"
        for j in keep:
            said[rows[j]].append(int(ids[j]))
        if not keep:
            break
        if len(keep) < len(rows):  # finished responses leave the batch: no work for padding
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            ids, alive, mask, position = ids[index], alive[index], mask[index], position[index]
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        logits = model(input_ids=ids[:, None], attention_mask=mask, position_ids=position[:, None],
                       past_key_values=cache, use_cache=True).logits[:, -1]
    return list(zip(said, finish))


# ---------------------------------------------------------------------------------------------

def plan_batches(lengths, n, batch):
    """Indices of prompts, by length, cut so that a batch holds about `batch` responses."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    size = max(1, batch // n)
    return [order[i:i + size] for i in range(0, len(order), size)]


def stop_tokens(model, tokenizer):
    """Ids that end a turn: the tokenizer's and whatever the model's own generation config adds."""
    ids = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}


def wrong_parts(row):
    """What was expected of a prompt that is neither text nor messages; None where it is."""
    keys = ("role", "content")
    good = [isinstance(m, dict) and all(isinstance(m.get(key), str) for key in keys)
            and m["role"].isidentifier() for m in as_messages(row["prompt"])]
    if not good or not all(good) or not isinstance(row.get("prefix", ""), str):
        return "'prompt' as text or messages {role, content}, and 'prefix' as text"


def main():
    args = parse_args()
    rows = read_jsonl(args.inp, {"prompt": (str, list)}, parts=wrong_parts)
    with output(args, rows) as (done, write, _):
        prompts = rows[:args.limit]
        todo = [f"{row['id']}/{k}" for row in prompts for k in range(args.n)]
        missing = [name for name in todo if name not in done]
        made, cut = 0, 0
        if missing:
            import torch
            model, tokenizer, _ = load_model(args.model, args.adapter, args.dtype, args.device)
            ids = [prompt_ids(tokenizer, as_messages(row["prompt"]), row.get("prefix", ""))
                   for row in prompts]
            stop, pad = stop_tokens(model, tokenizer), tokenizer.pad_token_id or 0
            settings = {k: getattr(args, k) for k in ("model", "adapter", "temperature", "top_p",
                                                      "top_k", "max_new_tokens", "seed")}
            batches = list(enumerate(plan_batches([len(i) for i in ids], args.n, args.batch)))
            wanted = set(missing)
            batches = [(number, members) for number, members in batches
                       if any(f"{prompts[i]['id']}/{k}" in wanted
                              for i in members for k in range(args.n))]
            for number, members in progress(batches, unit="batch"):
                with torch.inference_mode():
                    said = sample_batch(model, [ids[i] for i in members], args.n,
                                        (args.temperature, args.top_p, args.top_k),
                                        args.max_new_tokens, stop, pad,
                                        seed=args.seed * 1_000_003 + number)
                names = [(i, k) for i in members for k in range(args.n)]
                for (i, k), (tokens, finish) in zip(names, said):
                    name = f"{prompts[i]['id']}/{k}"
                    if name in wanted:
                        response = tokenizer.decode(tokens, skip_special_tokens=True)
                        write({**prompts[i], "id": name, "prompt_id": prompts[i]["id"],
                               "finish": finish, "response": response, "gen": settings})
                        made, cut = made + len(tokens), cut + (finish == "length")
    share = f"{cut / len(missing):.1%}" if missing else "-"
    report(rows_in=len(prompts), rows_out=len(todo), already_there=len(todo) - len(missing),
           tokens=made, cut_by_length=share)
    return 0


if __name__ == "__main__":
    run(main)
