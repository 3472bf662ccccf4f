"""
Stage 1. Sample n responses for every prompt, from a local model or any OpenAI-compatible server.

Reads   prompts.jsonl   {"prompt": str or [messages], "id"?, "topic"? (else the prompt)}; a "prefix"
                        continues the assistant's text (FactTune's entity variant)
Writes  samples.jsonl   the prompt's row n times, and what was said:
  {"topic": "Albania", "prompt": "In three sentences, ...", "id": "albania-geo/3",
   "prompt_id": "albania-geo", "response": "Albania is a country in ...", "finish": "stop",
   "gen": {"model": "data/world/model", "adapter": null, "temperature": 0.8, "top_p": 0.95,
           "top_k": 0, "max_new_tokens": 192, "seed": 0}}
  finish is "length" when the budget of tokens ran out before the model ended its turn. What a
  model thought before (<think>...</think>) goes to "reasoning", which no later stage reads.

--few-shot DEMOS   the five nearest rows {"prompt", "response"} go before each prompt (FLAME, 4.2:
                   answers of a base model); the row keeps the prompt alone
--postamble TEXT   is added to each prompt, in the row too (FactAlign: LongFact's)
--topics FILE      instead of --prompts: a topic a line; n new prompts about each (FactAlign), a
                   prompts file: {"id": "topics-2-7", "topic": "Moai", "prompt": "What are ..."}
--classify         each prompt's row once, with "fact_based": true or false (FLAME, section 4.2)

Local: batches are cut from the whole plan and seeded by (seed, number of the batch), so a resumed
file is the same file (with the same --limit). Server: one call a response, each with its own seed.

Not as in the papers: FactTune samples at T 1.0 and FLAME at T 0.7; here the defaults are those of
data/protocol.json. FLAME finds neighbours with DRAGON+, here BM25 does. The words of all questions
to a model are ours (data/prompts).

CPU, 2 minutes:  python 01_generate.py --prompts data/prompts_dev.jsonl \\
                     --out runs/dev/samples.jsonl --n 4 --limit 26
One GPU:         python 01_generate.py --prompts data/prompts_train.jsonl \\
                     --out runs/x/samples.jsonl --n 10 --temperature 1.0 --batch 512 \\
                     --model HuggingFaceTB/SmolLM2-1.7B-Instruct
A server:        python 01_generate.py --prompts data/prompts_dev.jsonl \\
                     --out runs/x/samples.jsonl --base-url http://localhost:8000/v1 --model NAME
"""
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from common import (TRIES, answer_of, arguments, as_messages, chat, chat_arguments, die, digest,
                    end_of_turn, load_model, output, progress, prompt_ids, read_jsonl, report, run,
                    template, workers)

PROTOCOL = json.loads((Path(__file__).parent / "data/protocol.json").read_text(encoding="utf-8"))
NEAREST = 5  # demonstrations before a prompt (FLAME, section 4.2)


def parse_args():
    p = arguments(__doc__, inp="--prompts", required=False)
    # What is asked
    p.add_argument("--topics", metavar="FILE", help="instead of --prompts: write new prompts")
    p.add_argument("--classify", action="store_true", help="tell which prompts ask for facts")
    p.add_argument("--few-shot", metavar="FILE", help="demonstrations to put before each prompt")
    p.add_argument("--postamble", metavar="TEXT", default="", help="put after each prompt")
    p.add_argument("--shard", metavar="I/N", help="only every Nth prompt, from the Ith on (from 0)")
    # Model
    p.add_argument("--model", help="a folder, a hub name, or the server's name of it (default: the "
                   "embedded world's, data/world/model)")
    p.add_argument("--adapter", metavar="DIR", help="a PEFT adapter trained by 05")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"],
                   help="bfloat16 is the faster one on CPUs that know it")
    p.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    chat_arguments(p)
    # Sampling: the protocol's values (data/protocol.json)
    p.add_argument("--n", type=int, default=PROTOCOL["sampled"]["n"], help="responses a prompt")
    p.add_argument("--temperature", type=float, default=PROTOCOL["sampled"]["temperature"],
                   help="0 is greedy")
    p.add_argument("--top-p", type=float, default=PROTOCOL["top_p"], help="nucleus; 1 is off")
    p.add_argument("--top-k", type=int, default=PROTOCOL["top_k"], help="0 is off")
    p.add_argument("--max-new-tokens", type=int, default=PROTOCOL["max_new_tokens"])
    p.add_argument("--batch", type=int, default=64, help="responses sampled side by side")
    args = p.parse_args()
    if args.classify:
        args.n, args.temperature = 1, 0.0
    if bool(args.inp) == bool(args.topics) or args.topics and (args.classify or args.postamble):
        die("expected one of --prompts and --topics, --classify and --postamble with --prompts")
    if args.few_shot and (args.topics or args.classify):
        die("expected --few-shot with --prompts and without --classify, which asks on its own")
    if args.n < 1 or args.batch < 1 or args.max_new_tokens < 1:
        die("--n, --batch and --max-new-tokens must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
        die("expected --temperature >= 0, 0 < --top-p <= 1, --top-k >= 0")
    if args.temperature == 0 and args.n > 1:
        die(f"--temperature 0 gives one response, {args.n} times: use --n 1")
    if args.base_url and args.adapter:
        die("expected --adapter without --base-url: a server gives an adapter a name (--model)")
    if args.dry_run and not args.base_url:
        die("expected --dry-run with --base-url: a local model costs no money")
    args.model = args.model or (None if args.base_url else "data/world/model")
    args.concurrency = args.batch
    args.batch = None if args.base_url else args.batch  # there it does not change what is said
    return args


# ---------------------------------------------------------------------------------------------
# What is asked, and what a reply becomes

def wrong_parts(row):
    """What was expected of a prefix that is no text; None where it is."""
    return None if isinstance(row.get("prefix", ""), str) else "'prefix' as text"


def read_prompts(args):
    """The rows to ask about: --prompts, or a row {"id", "topic"} for each line of --topics."""
    if args.topics:
        path = args.inp = Path(args.topics)
        if not path.is_file():
            die(f"{path}: no such file; it holds a topic a line")
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            die(f"{path}: expected UTF-8, found {error.object[error.start:error.start + 9]}")
        if text.startswith("{"):
            die(f"{path}:1: expected a topic a line, found JSON")
        rows = [{"id": f"{path.stem}-{n}", "topic": line.strip()}
                for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        rows = read_jsonl(args.inp, {"prompt": (str, list)}, parts=wrong_parts)
        for row in rows:
            row.setdefault("topic", as_messages(row["prompt"])[-1]["content"])
    for row in rows if args.postamble else ():
        *before, last = as_messages(row["prompt"])
        row["prompt"] = [*before, {**last, "content": f"{last['content']} {args.postamble}"}]
    if args.shard:
        parts = re.fullmatch(r"(\d+)/([1-9]\d*)", args.shard)
        if not parts or int(parts[1]) >= int(parts[2]):
            die(f"expected --shard as I/N with I from 0 to N - 1, found {args.shard}")
        rows = rows[int(parts[1])::int(parts[2])]
    if not rows:
        die(f"{args.inp}: expected at least one prompt (in this shard) or topic, found none")
    return rows


def nearest_demos(demos):
    """f(messages): the NEAREST demonstrations as turns, best last, by BM25 over what was asked."""
    from rank_bm25 import BM25Plus
    asked = [as_messages(demo["prompt"])[-1]["content"] for demo in demos]
    index = BM25Plus([re.findall(r"\w+", text.lower()) or [""] for text in asked])

    def turns(messages):
        question = messages[-1]["content"]
        scores = index.get_scores(re.findall(r"\w+", question.lower()))
        best = sorted((i for i in range(len(demos)) if not question.startswith(asked[i])),
                      key=lambda i: -scores[i])[:NEAREST]
        return [turn for i in reversed(best) for turn in
                (*as_messages(demos[i]["prompt"]),
                 {"role": "assistant", "content": demos[i]["response"]})]
    return turns


def messages_of(args, row, turns):
    """What the model is shown for a row."""
    if args.topics:
        return template("topics", topic=row["topic"])
    asked = as_messages(row["prompt"])
    if args.classify:
        return template("classify", instruction=asked[-1]["content"])
    return turns(asked) + asked if turns else asked


def name_of(args, row, k):
    return row["id"] if args.classify else f"{row['id']}{'-' if args.topics else '/'}{k}"


def row_of(args, row, k, reply):
    """The row to write for a reply {"text", "finish", "thought"}; None where it is not usable."""
    if args.classify:
        word = re.search(r"\b(yes|no)\W*$", answer_of(reply).lower())
        return {**row, "fact_based": word[1] == "yes"} if word else None
    if args.topics:
        found = re.fullmatch(r"\s*Subject: *(\S.*?)\s*\n\s*Prompt: *(\S.*?)\s*", answer_of(reply))
        return found and {"id": name_of(args, row, k), "topic": found[1], "prompt": found[2],
                          "fact_based": True, "domain": row["topic"]}
    if reply["finish"] not in ("stop", "length"):
        return None  # a filter's work
    thought = re.match(r"(?:\s*<think>)?(.*?)</think>\s*|\s*<think>(.*)", reply["text"], re.DOTALL)
    said = reply["text"][thought.end() if thought else 0:]
    thought = (reply["thought"] or thought and (thought[1] or thought[2]) or "").strip()
    settings = {key: getattr(args, key) for key in ("model", "adapter", "temperature", "top_p",
                                                    "top_k", "max_new_tokens", "seed")}
    return {**row, "id": name_of(args, row, k), "prompt_id": row["id"], "finish": reply["finish"],
            "response": said, **({"reasoning": thought} if thought else {}), "gen": settings}


# ---------------------------------------------------------------------------------------------
# Sampling. B = responses in the batch, V = vocabulary

def next_tokens(logits, temperature, top_p, top_k, generator):
    """Temperature, then top-k, then top-p, then one draw a row. logits (B, V) -> ids (B,)."""
    import torch
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        floor = scaled.topk(top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    probs = scaled.softmax(-1)
    probs = nucleus(probs, top_p) if top_p < 1 else probs
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def nucleus(probs, top_p, width=1024):
    """probs (B, V) with 0 for all but the likeliest tokens that reach top_p together; of equals at
    the edge the first stay. Sorting all of V costs as much as a small model, and few are wider."""
    ordered = probs.topk(min(width, probs.shape[-1])).values
    inside = ordered.cumsum(-1) - ordered < top_p  # mass of the likelier tokens: 0 for the first
    edge = ordered.gather(-1, inside.sum(-1, keepdim=True) - 1)
    ties, room = probs == edge, (inside & (ordered == edge)).sum(-1, keepdim=True)
    kept = probs.where((probs > edge) | ties & (ties.cumsum(-1) <= room), 0.0)
    wide = ordered.sum(-1) < top_p
    if width < probs.shape[-1] and wide.any():
        kept[wide] = nucleus(probs[wide], top_p, probs.shape[-1])
    return kept


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
    # A prompt goes through the model once; its cache is repeated for the n responses
    out = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True,
                logits_to_keep=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(n)
    logits, mask, position = (t.repeat_interleave(n, 0)
                              for t in (out.logits[:, -1], mask, position[:, -1:]))
    said = [[] for _ in range(len(prompts) * n)]
    alive = list(range(len(said)))  # which response each row of the batch is
    for _ in range(max_new_tokens):
        ids = next_tokens(logits, *sampling, generator)
        for i, token in zip(alive, ids.tolist()):
            said[i].append(token)
        keep = [row for row, i in enumerate(alive) if said[i][-1] not in stop_ids]
        if not keep:
            break
        if len(keep) < len(alive):  # finished responses leave the batch: no work for padding
            alive = [alive[row] for row in keep]
            keep = torch.tensor(keep, device=device)
            cache.batch_select_indices(keep)
            ids, mask, position = ids[keep], mask[keep], position[keep]
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        logits = model(input_ids=ids[:, None], attention_mask=mask, position_ids=position,
                       past_key_values=cache, use_cache=True).logits[:, -1]
    return [(tokens[:-1], "stop") if tokens[-1] in stop_ids else (tokens, "length")
            for tokens in said]


# ---------------------------------------------------------------------------------------------
# Who is asked. Both yield (number of the prompt, k, row to write or error) for all that is wanted

def plan_batches(lengths, n, batch):
    """Indices of prompts, by length, cut so that a batch holds about `batch` responses."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    size = max(1, batch // n)
    return [order[i:i + size] for i in range(0, len(order), size)]


def stop_tokens(model, tokenizer):
    """Ids that end a turn: the template's, the tokenizer's, those of the model's own config."""
    ids = model.generation_config.eos_token_id
    own = end_of_turn(tokenizer) if tokenizer.chat_template else None
    return {own, tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}


def ids_of(tokenizer, messages, prefix, plain):
    """Token ids of what the model is shown; plain: as text, for a base model without a template."""
    if not plain:
        return prompt_ids(tokenizer, messages, prefix)
    turns = {"user": "Instruction: {}\nAnswer:", "assistant": " {}\n\n"}
    text = "".join(turns.get(m["role"], "{}\n\n").format(m["content"]) for m in messages)
    text += f" {prefix}" if prefix else ""
    return tokenizer(text, split_special_tokens=True)["input_ids"]  # markup is only text


def from_model(args, rows, wanted, turns, counts):
    import torch
    model, tokenizer, _ = load_model(args.model, args.adapter, args.dtype, args.device)
    plain = bool(turns) and tokenizer.chat_template is None
    ids = [ids_of(tokenizer, messages_of(args, row, turns),
                  "" if args.classify else row.get("prefix", ""), plain) for row in rows]
    stop, pad = stop_tokens(model, tokenizer), tokenizer.pad_token_id or 0
    batches = plan_batches([len(i) for i in ids], args.n, args.concurrency)
    # A batch with a missing response is sampled again whole
    missing = [(number, members) for number, members in enumerate(batches)
               if wanted & {(i, k) for i in members for k in range(args.n)}]
    for number, members in progress(missing, unit="batch"):
        with torch.inference_mode():
            said = sample_batch(model, [ids[i] for i in members], args.n,
                                (args.temperature, args.top_p, args.top_k), args.max_new_tokens,
                                stop, pad, seed=args.seed * 1_000_003 + number)
        plan = [(i, k) for i in members for k in range(args.n)]
        for (i, k), (tokens, finish) in zip(plan, said):
            if (i, k) in wanted:
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                if plain:  # a blank line would begin the next demonstration
                    text, blank, _ = text.partition("\n\n")
                    text, finish = text.strip(), "stop" if blank else finish
                counts["tokens"] += len(tokens)
                reply = {"text": text, "finish": finish, "thought": None}
                yield i, k, row_of(args, rows[i], k, reply) or "not what was asked for"


def from_server(args, rows, wanted, turns, ask):
    def one(i, k):
        name = hashlib.sha256(f"{args.seed} {name_of(args, rows[i], k)}".encode()).hexdigest()
        try:
            return ask(messages_of(args, rows[i], turns),
                       lambda reply: row_of(args, rows[i], k, reply),
                       "Subject: X\nPrompt: What is X?" if args.topics else "yes",
                       temperature=args.temperature, top_p=args.top_p, top_k=args.top_k or -1,
                       max_tokens=args.max_new_tokens, seed=int(name[:7], 16),
                       tries=TRIES if args.topics or args.classify else 1)
        except ConnectionError as error:
            return str(error)

    with workers(args.concurrency) as pool:
        asked = {key: pool.submit(one, *key) for key in sorted(wanted)}
        for (i, k), answer in progress(asked.items(), unit="call"):
            yield i, k, answer.result() or "not what was asked for"


def main():
    args = parse_args()
    rows = read_prompts(args)
    demos = args.few_shot and read_jsonl(args.few_shot, {"prompt": (str, list), "response": str},
                                         parts=wrong_parts)
    args.few_shot_sha256 = demos and digest(demos)
    turns = nearest_demos(demos) if demos else None
    if args.topics or args.classify:
        args.prompts_sha256 = digest(template("topics" if args.topics else "classify"))
    ask, counts = chat(args) if args.base_url else (None, Counter())
    if args.base_url and not args.classify and any(row.get("prefix") for row in rows):
        die(f"{args.inp}: expected prompts without a prefix: a server cannot go on with a text (02 "
            "--method llm --questions-out asks whole questions)")
    failed = repeated = cut = 0
    with output(args, rows) as (done, write, fail):
        rows = rows[:args.limit]
        wanted = {(i, k) for i, row in enumerate(rows) for k in range(args.n)
                  if name_of(args, row, k) not in done}
        invented = {row["prompt"] for row in done.values()} if args.topics else None
        found = from_server if args.base_url else from_model
        for i, k, row in found(args, rows, wanted, turns, ask or counts) if wanted else ():
            if isinstance(row, str):
                failed += 1
                fail({**rows[i], "id": name_of(args, rows[i], k)}, row)
            elif args.topics and row["prompt"] in invented:
                repeated += 1
            else:
                write(row)
                cut += row.get("finish") == "length"
                if args.topics:
                    invented.add(row["prompt"])
    report(rows_in=len(rows), rows_out=len(rows) * args.n - failed - repeated,
           already_there=len(rows) * args.n - len(wanted), failed=failed,
           repeated_prompts=repeated, **counts,
           cut_by_length=f"{cut / len(wanted):.1%}" if wanted else "-")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
