"""
Stage 4. Turn responses into training rows: one sub-command a rule.

facttune  pairs: of the responses to one prompt, the top-scored is preferred over each that scores
          lower (--pairs best), or of any two the higher-scored (--pairs all, the authors' code)
sft       targets: every usable response, FactTune's stage before DPO; 02's unjudged rows will do
rft       targets: the top-scored response to a prompt, the first of equals (RAFT, 2304.06767)
Scores: precision S/(S+NS), or F1@K of it and min(S/K, 1). Repeated facts count once, the first.

Reads   verified.jsonl   03's rows: {"id", "prompt_id", "topic", "prompt", "response", "finish",
                         "sentences": [{"start", "end", "facts": [{"text", "label"}]}]}
Writes  prefs.jsonl      whole; it loads into TRL's DPOTrainer or SFTTrainer unchanged. A pair:
  {"id": "fiji-geo/3>fiji-geo/0", "prompt_id": "fiji-geo", "topic": "Fiji", "kind": "fact",
   "prompt": [{"role": "user", "content": "In three sentences, ..."}],
   "chosen": [{"role": "assistant", "content": "Fiji is an island ..."}],
   "rejected": [{"role": "assistant", "content": "Fiji is a landlocked ..."}],
   "score_chosen": 0.5, "score_rejected": 0.0, "finish": {"chosen": "stop", "rejected": "length"}}
  A target ends {"completion": [{"role": "assistant", ...}], "finish": "stop"}; rft's has a "score".

The text trained on is the response up to its last whole sentence. Its finish is "stop" where the
model ended its turn right there: only then does 05 append the end-of-turn token and train on it. A
cut response must not teach the model to stop.

What makes no row is counted by its reason. A response: abstains, has more than 20 % null labels or
none that is S or NS (sft does not ask), has no whole sentence, has one 10-gram more than 5 times
(FactAlign's code), or repeats another response to its prompt. A prompt: has too few usable
responses ("few": sft needs one, the others two), or they all score alike ("tied").
Printed for OUT's rows, a side each: mean words, share that ends by "stop", mean score; beside rft's
targets all usable responses to their prompts. Where the lengths differ, length is learnt, too.

Not as in the papers: FactTune's code pairs all (best-vs-rest is the rule of the paper's summary),
keeps repeated facts and responses, and has no 10-gram guard; RAFT keeps tied prompts.

  python 04_build_prefs.py facttune --in runs/demo/verified.jsonl --out runs/demo/prefs.jsonl \\
      --eval-out runs/demo/prefs_heldout.jsonl --eval-prompts data/prompts_eval.jsonl
  python 04_build_prefs.py rft --in runs/demo/verified.jsonl --out runs/demo/rft.jsonl --reward f1
"""
import argparse
import hashlib
import json
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from statistics import fmean

from common import as_messages, die, dumps, read_jsonl, report, run, same_run, write_whole
from rules import fact_key

PROTOCOL = json.loads((Path(__file__).parent / "data/protocol.json").read_text(encoding="utf-8"))
MAX_NULL = 0.2   # above this share of unjudged facts a response has no score
MAX_REPEATS = 5  # FactAlign's notebook: one 10-gram more often than this, and the label is false
LONGER = 1.2     # summed log-probs learn length when one side is much longer


def parse_args():
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--in", dest="inp", nargs="+", required=True, metavar="FILE", help="03's rows (sft: 02's)")
    add("--out", required=True, metavar="FILE", help="JSONL to write")
    add("--eval-prompts", metavar="FILE", help="refuse the prompts and topics in there")
    add("--eval-out", metavar="FILE", help="set some topics aside there, to evaluate 05 on")
    add("--holdout", type=float, default=0.1, help="share of the topics set aside")
    add("--seed", type=int, default=0, help="which topics are set aside")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--overwrite", action="store_true", help="replace an OUT made with other flags")
    scored = argparse.ArgumentParser(add_help=False)
    add = scored.add_argument
    add("--reward", default="precision", choices=["precision", "f1"], help="FactTune's, or F1@K")
    add("--k", type=int, default=PROTOCOL["k"], help="K of f1 (default: data/protocol.json's)")
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(reward=None, k=None, margin=0.0)  # of the rules that have no such flag
    rules = p.add_subparsers(dest="rule", required=True)
    add = rules.add_parser("facttune", parents=[shared, scored], help="pairs").add_argument
    add("--pairs", default="best", choices=["best", "all"], help="best against rest, or any two")
    add("--margin", type=float, default=0.0, help="scores must differ by more (FactTune: 0)")
    rules.add_parser("sft", parents=[shared], help="all responses as targets")
    rules.add_parser("rft", parents=[shared, scored], help="rejection sampling: the best as target")
    args = p.parse_args()
    if args.reward == "f1" and args.k is None:
        die("data/protocol.json has no K yet: give --k N (06_eval.py score: median_claims)")
    if any(n is not None and n < 1 for n in (args.k, args.limit)):
        die("expected --k and --limit of at least 1")
    if not (0 <= args.margin < 1 and 0 < args.holdout < 1):
        die("expected 0 <= --margin < 1 and 0 < --holdout < 1")
    files = [f for f in (*args.inp, args.out, args.eval_out, args.eval_prompts) if f]
    if len({Path(f).resolve() for f in files}) < len(files):
        die("expected different files for --in, --out, --eval-out and --eval-prompts")
    return args


# ---------------------------------------------------------------------------------------------
# Reading

def fault(row, judged):
    """What was expected inside a row of 03 (not judged: of 02), or None if it is there."""
    if row.get("finish") not in ("stop", "length"):
        return f"'finish' as stop or length (01_generate.py), not {row.get('finish')!r:.60}"
    for s in row["sentences"]:
        if not (isinstance(s, dict) and isinstance(s.get("facts"), list)
                and type(s.get("start")) is int and type(s.get("end")) is int
                and 0 <= s["start"] <= s["end"] <= len(row["response"])):
            return f"a sentence as {{start, end, facts}} within the response, not {s!r:.60}"
        for fact in s["facts"]:
            if not (isinstance(fact, dict) and isinstance(fact.get("text"), str)
                    and fact.get("label", "none" if judged else None) in ("S", "NS", "IR", None)):
                return f"a fact as {{text, label: S|NS|IR|null}} (03_verify.py), not {fact!r:.60}"


def read_groups(paths, judged):
    """(all rows, {prompt_id: its rows}) of some files in file order, every row checked."""
    fields = {"prompt_id": str, "prompt": (str, list), "response": str, "sentences": list}
    rows, groups, ids, seen = [], {}, set(), {}

    def wrong(row):
        prompt = row["prompt"], topic_of(row)
        if row["id"] in ids:
            return "an id that no earlier file has"
        if seen.setdefault(row["prompt_id"], prompt) != prompt:
            return f"the prompt and topic that {row['prompt_id']!r} had before"
        return fault(row, judged)

    for path in paths:
        new = read_jsonl(path, fields, "03_verify.py" if judged else "02_decompose.py", parts=wrong)
        ids |= {row["id"] for row in new}
        rows += new
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return rows, groups


def topic_of(row):
    return str(row.get("topic") or row["prompt_id"])


def leaked(groups, prompts):
    """Ids of the prompts in `groups` that `prompts` has too: by id, by topic or by wording."""
    ids = {row["id"] for row in prompts}
    topics = {str(row.get("topic") or row["id"]).casefold() for row in prompts}
    wordings = {dumps(as_messages(row["prompt"])) for row in prompts}
    return [name for name, (row, *_) in groups.items()
            if name in ids or topic_of(row).casefold() in topics
            or dumps(as_messages(row["prompt"])) in wordings]


# ---------------------------------------------------------------------------------------------
# One response: what of it is trained on, and its score

def training_text(row):
    """(text, finish): the response up to its last whole sentence, and whether a turn ends there.
    02 lists the unfinished last sentence of a cut response, too: it reaches the end, and goes."""
    spans = [(s["start"], s["end"]) for s in row["sentences"]]
    whole = len(row["response"].rstrip())
    if row["finish"] == "length" and spans and spans[-1][1] >= whole:
        spans = spans[:-1]
    if not spans:
        return "", "length"
    start, end = spans[0][0], spans[-1][1]
    ended = row["finish"] == "stop" and end >= whole
    return row["response"][start:end], "stop" if ended else "length"


def repeats(text, n=10):
    """How often the commonest n-gram of words occurs."""
    words = text.lower().split()
    return max(Counter(zip(*(words[i:] for i in range(n)))).values(), default=0)


def unique_labels(row):
    """Labels of the facts; those with equal content words count once, the first of them."""
    first = {}
    for sentence in row["sentences"]:
        for fact in sentence["facts"]:
            first.setdefault(fact_key(fact["text"], topic_of(row)), fact["label"])
    return list(first.values())


def score(labels, reward, k=None):
    """precision = S/(S+NS); f1 = F1@K, the harmonic mean of precision and min(S/K, 1) (SAFE)."""
    s = labels.count("S")
    judged = s + labels.count("NS")
    # one quotient: equal scores are equal floats
    return s / judged if reward == "precision" else 2 * s / (judged + max(k, s))


def candidates(rows, reward=None, k=None):
    """(usable responses to a prompt, as target rows; why the others are not usable).
    Without a reward no verdict is looked at and the rows have no score."""
    found, unused = {}, []
    for row in rows:
        labels = unique_labels(row) if reward else []
        text, finish = training_text(row)
        faults = {
            "abstained": row.get("abstained"),
            "unjudged": labels.count(None) > MAX_NULL * len(labels),
            "no_fact": reward and "S" not in labels and "NS" not in labels,
            "no_sentence": not text.strip(),
            "repetitive": repeats(text) > MAX_REPEATS,
            "duplicate": text in found,
        }
        if any(faults.values()):
            unused.append(next(name for name, so in faults.items() if so))
            continue
        found[text] = {"id": row["id"], "prompt_id": row["prompt_id"], "topic": topic_of(row),
                       "kind": "fact", "prompt": as_messages(row["prompt"]),
                       "completion": [{"role": "assistant", "content": text}], "finish": finish,
                       **({"score": score(labels, reward, k)} if reward else {})}
    return list(found.values()), unused


def pair(chosen, rejected):
    """The training row that prefers one usable response to another."""
    return {"id": f"{chosen['id']}>{rejected['id']}",
            **{name: chosen[name] for name in ("prompt_id", "topic", "kind", "prompt")},
            "chosen": chosen["completion"], "rejected": rejected["completion"],
            "score_chosen": chosen["score"], "score_rejected": rejected["score"],
            "finish": {"chosen": chosen["finish"], "rejected": rejected["finish"]}}


# ---------------------------------------------------------------------------------------------
# The rules: (training rows, Counter of what became of prompts, Counter of why responses are unused)

def preferences(responses, margin=0.0, pairs="best"):
    """[(chosen, rejected)], scores > margin apart: of the best (the first of equals), or of all."""
    best = max(responses, key=lambda r: r["score"], default=None)
    return [(a, b) for a, b in permutations(responses, 2) if (pairs == "all" or a is best)
            and round(a["score"] - b["score"], 9) > margin]  # in floats, 0.4 - 0.3 > 0.1


def by_prompt(groups, make, reward=None, k=None):
    """A rule that makes its rows of the usable responses to one prompt at a time."""
    made, prompts, unused = [], Counter(), Counter()
    for rows in groups.values():
        responses, reasons = candidates(rows, reward, k)
        found = make(responses)
        prompts["used" if found else "tied" if len(responses) > 1 else "few"] += 1
        unused.update(reasons)
        made += found
    return made, prompts, unused


def facttune(groups, reward="precision", k=None, margin=0.0, pairs="best"):
    """FactTune (2311.08401): of two responses to a prompt, the more factual one is preferred."""
    return by_prompt(groups, lambda found: [
        pair(*two) for two in preferences(found, margin, pairs)], reward, k)


def sft(groups):
    """FactTune's first stage: every response is a target."""
    return by_prompt(groups, list)


def rft(groups, reward="precision", k=None):
    """RAFT (2304.06767): the best response is the target, where it beats any other."""
    return by_prompt(groups, lambda found: [best for best, _ in preferences(found)[:1]], reward, k)


RULES = {"facttune": lambda groups, a: facttune(groups, a.reward, a.k, a.margin, a.pairs),
         "sft": lambda groups, a: sft(groups),
         "rft": lambda groups, a: rft(groups, a.reward, a.k)}


def split_topics(rows, share, seed):
    """(train, held out): the topics that a hash puts first are held out, with all their rows."""
    topics = sorted({row["topic"] for row in rows},
                    key=lambda topic: hashlib.sha256(f"{seed}/{topic}".encode()).hexdigest())
    held = set(topics[:max(1, round(share * len(topics)))])
    return [r for r in rows if r["topic"] not in held], [r for r in rows if r["topic"] in held]


def statistics(rows, side):
    """Of one side of training rows: mean words, share that ends by "stop", mean score if any."""
    ends = [row["finish"] if side == "completion" else row["finish"][side] for row in rows]
    key = "score" if side == "completion" else f"score_{side}"
    columns = {"words": [len(row[side][0]["content"].split()) for row in rows],
               "stop": [end == "stop" for end in ends],
               "score": [row[key] for row in rows if key in row]}
    return {name: round(fmean(column), 2) for name, column in columns.items() if column}


def main():
    args = parse_args()
    rows, groups = read_groups(args.inp, judged=args.rule != "sft")
    groups = dict(list(groups.items())[:args.limit])
    asked = read_jsonl(args.eval_prompts, {"prompt": (str, list)}) if args.eval_prompts else []
    both = leaked(groups, asked)
    if both:
        die(f"{args.eval_prompts}: expected no prompt, topic or wording of --in, "
            f"found {len(both)}: {', '.join(both)}")
    made, prompts, unused = RULES[args.rule](groups, args)
    train, held = split_topics(made, args.holdout, args.seed) if args.eval_out else (made, [])
    told = {side: statistics(train, side) for side in ("chosen", "rejected", "completion")
            if train and side in train[0]}
    if args.rule == "rft":  # is the best longer than the others?
        pools = [candidates(groups[row["prompt_id"]], args.reward, args.k)[0] for row in train]
        told["usable"] = statistics([r for pool in pools for r in pool], "completion")
    report(prompts_in=len(groups), **{f"  {name}": n for name, n in sorted(prompts.items())},
           responses_in=sum(map(len, groups.values())),
           **{f"  {reason}": n for reason, n in sorted(unused.items())},
           rows=len(train), rows_held_out=len(held),
           rows_a_prompt=round(len(made) / max(1, prompts["used"]), 2),
           **{f"{name}_{side}": n for side in told for name, n in told[side].items()})
    if not train:
        die("no rows to train on, see the counts. More samples may help (01_generate.py --n)")
    words = [side["words"] for side in told.values()]
    if max(words) > LONGER * min(words):
        print(f"warning: {' and '.join(told)} differ in length by more than 20 %: training moves "
              "the length of responses, too", file=sys.stderr)
    files = {path: part for path, part in ((args.eval_out, held), (args.out, train)) if path}
    for path in files:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(*same_run(Path(args.out), args, rows))
    for path, part in files.items():
        write_whole(path, "".join(dumps(row) + "\n" for row in part))
    return 0


if __name__ == "__main__":
    run(main)
