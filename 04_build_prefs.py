"""
Stage 4. Turn verified responses into training rows: one sub-command per paper's rule.

facttune   best-vs-rest: of the responses to one prompt, the top-scored one is preferred over each
           that scores strictly lower. Reward: precision S/(S+NS), or F1@K of it and min(S/K, 1).

Reads   verified.jsonl   03's rows: {"id", "prompt_id", "topic", "prompt", "response", "finish",
                         "sentences": [{"start", "end", "facts": [{"text", "label"}]}]}
Writes  prefs.jsonl      one row a pair; loads into TRL's DPOTrainer unchanged:
  {"id": "fiji-geo/3>fiji-geo/0", "prompt_id": "fiji-geo", "topic": "Fiji", "kind": "fact",
   "prompt": [{"role": "user", "content": "In three sentences, ..."}],
   "chosen": [{"role": "assistant", "content": "Fiji is an island ..."}],
   "rejected": [{"role": "assistant", "content": "Fiji is a landlocked ..."}],
   "score_chosen": 0.5, "score_rejected": 0.0,
   "finish": {"chosen": "stop", "rejected": "length"}}

The text trained on is the response up to its last whole sentence. Its finish is "stop" where the
model ended its turn right there: only then does 05 append the end-of-turn token and train on it. A
cut response must not teach the model to stop.

What makes no row is counted by its reason. A response: abstains, has no fact labelled S or NS, has
more than 20 % null labels, has no whole sentence, has one 10-gram more than 5 times (FactAlign's
code), or repeats another response to its prompt. A prompt: has fewer than two usable responses
("few"), or they all score alike ("tied"). Repeated facts of a response count once, the first.

Not as in the paper: FactTune's code pairs all responses that differ (best-vs-rest is the rule of
the paper's summary), keeps repeated facts and responses, and has no 10-gram guard.

OUT is written whole; the same command writes the same bytes, so there is nothing to resume.

  python 04_build_prefs.py facttune --in runs/demo/verified.jsonl --out runs/demo/prefs.jsonl \\
      --eval-out runs/demo/prefs_heldout.jsonl --eval-prompts data/prompts_eval.jsonl
"""
import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

from common import as_messages, die, dumps, read_jsonl, report, run, same_run, write_whole
from rules import fact_key

PROTOCOL = json.loads((Path(__file__).parent / "data/protocol.json").read_text(encoding="utf-8"))
MAX_NULL = 0.2   # above this share of unjudged facts a response has no score
MAX_REPEATS = 5  # FactAlign's notebook: one 10-gram more often than this, and the label is false
LONGER = 1.2     # summed log-probs learn length when one side is much longer


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    rules = p.add_subparsers(dest="rule", required=True, metavar="facttune")
    facttune = rules.add_parser("facttune", help="best-vs-rest pairs by factuality (2311.08401)")
    for rule in (facttune,):
        add = rule.add_argument
        add("--in", dest="inp", nargs="+", required=True, metavar="FILE", help="03's rows")
        add("--out", required=True, metavar="FILE", help="JSONL to write")
        add("--eval-prompts", metavar="FILE", help="refuse the prompts and topics in there")
        add("--eval-out", metavar="FILE", help="set some topics aside there, to evaluate 05 on")
        add("--holdout", type=float, default=0.1, help="share of the topics set aside")
        add("--seed", type=int, default=0, help="which topics are set aside")
        add("--limit", type=int, metavar="N", help="only the first N prompts")
        add("--overwrite", action="store_true", help="replace an OUT made with other flags")
    add = facttune.add_argument
    add("--reward", default="precision", choices=["precision", "f1"],
        help="FActScore without length penalty (FactTune's), or F1@K")
    add("--k", type=int, default=PROTOCOL["k"], help="K of f1 (default: data/protocol.json's)")
    add("--margin", type=float, default=0.0, help="scores must differ by more (FactTune: 0)")
    args = p.parse_args()
    if args.reward == "f1" and args.k is None:
        die("data/protocol.json has no K yet: give --k N, or see 06_eval.py score --suggest-k")
    if any(n is not None and n < 1 for n in (args.k, args.limit)):
        die("expected --k and --limit of at least 1")
    if args.margin < 0 or not 0 < args.holdout < 1:
        die("expected --margin >= 0 and 0 < --holdout < 1")
    files = [f for f in (*args.inp, args.out, args.eval_out, args.eval_prompts) if f]
    if len({Path(f).resolve() for f in files}) < len(files):
        die("expected different files for --in, --out, --eval-out and --eval-prompts")
    return args


# ---------------------------------------------------------------------------------------------
# Reading

def fault(row):
    """What is wrong inside a verified row, as (expected, found); None if nothing is."""
    if row["finish"] not in ("stop", "length"):
        return "'finish' as stop or length (01_generate.py writes it)", row["finish"]
    for s in row["sentences"]:
        if not (isinstance(s, dict) and isinstance(s.get("facts"), list)
                and type(s.get("start")) is int and type(s.get("end")) is int
                and 0 <= s["start"] <= s["end"] <= len(row["response"])):
            return "a sentence as {start, end, facts} within the response (02_decompose.py)", s
        for fact in s["facts"]:
            if not (isinstance(fact, dict) and isinstance(fact.get("text"), str)
                    and fact.get("label", "none") in ("S", "NS", "IR", None)):
                return "a fact as {text, label: S|NS|IR|null} (03_verify.py)", fact
    return None


def read_groups(paths):
    """(all rows, {prompt_id: its rows}) of verified files in file order, every row checked."""
    fields = {"prompt_id": str, "prompt": (str, list), "response": str, "finish": str,
              "sentences": list}
    rows, groups, ids = [], {}, set()
    for path in paths:
        found = read_jsonl(path, fields, made_by="03_verify.py")
        with open(path, "rb") as f:
            lines = [n for n, line in enumerate(f, 1) if line.strip()]
        for n, row in zip(lines, found):
            group, wrong = groups.setdefault(row["prompt_id"], []), fault(row)
            if row["id"] in ids:
                wrong = "an id that no earlier file has", row["id"]
            elif group and group[0]["prompt"] != row["prompt"]:
                wrong = f"the prompt that {row['prompt_id']!r} had before", row["prompt"]
            if wrong:
                die(f"{path}:{n}: expected {wrong[0]}, found {wrong[1]!r:.60}")
            group.append(row)
        ids |= {row["id"] for row in found}
        rows += found
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

    02 lists the unfinished last sentence of a cut response too. It reaches the end of the response;
    it goes.
    """
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
    if reward == "precision":
        return s / judged
    return 2 * s / (judged + max(k, s))  # one quotient: equal scores are equal floats


def candidates(rows, reward, k):
    """(usable responses to a prompt: {"id", "text", "finish", "score"}; why the others are not)."""
    found, unused = {}, []
    for row in rows:
        labels = unique_labels(row)
        text, finish = training_text(row)
        faults = {
            "abstained": row.get("abstained"),
            "unjudged": labels.count(None) > MAX_NULL * len(labels),
            "no_fact": "S" not in labels and "NS" not in labels,
            "no_sentence": not text,
            "repetitive": repeats(text) > MAX_REPEATS,
            "duplicate": text in found,
        }
        if any(faults.values()):
            unused.append(next(name for name, so in faults.items() if so))
        else:
            found[text] = {"id": row["id"], "text": text, "finish": finish,
                           "score": score(labels, reward, k)}
    return list(found.values()), unused


# ---------------------------------------------------------------------------------------------
# FactTune (2311.08401)

def best_vs_rest(responses, margin=0.0):
    """[(chosen, rejected)]: the first of the top-scored against each that is lower by > margin."""
    best = max(responses, key=lambda r: r["score"])
    return [(best, r) for r in responses if best["score"] - r["score"] > margin]


def facttune(groups, reward="precision", k=None, margin=0.0):
    """(pair rows, Counter of what became of prompts, Counter of why responses make no row)."""
    pairs, prompts, unused = [], Counter(), Counter()
    for name, rows in groups.items():
        responses, reasons = candidates(rows, reward, k)
        unused.update(reasons)
        found = best_vs_rest(responses, margin) if len(responses) > 1 else []
        prompts["used" if found else "tied" if len(responses) > 1 else "few"] += 1
        for chosen, rejected in found:
            pairs.append({
                "id": f"{chosen['id']}>{rejected['id']}", "prompt_id": name,
                "topic": topic_of(rows[0]), "kind": "fact",
                "prompt": as_messages(rows[0]["prompt"]),
                "chosen": [{"role": "assistant", "content": chosen["text"]}],
                "rejected": [{"role": "assistant", "content": rejected["text"]}],
                "score_chosen": chosen["score"], "score_rejected": rejected["score"],
                "finish": {"chosen": chosen["finish"], "rejected": rejected["finish"]}})
    return pairs, prompts, unused


# ---------------------------------------------------------------------------------------------

def split_topics(pairs, share, seed):
    """(train, held out): the topics that a hash puts first are held out, with all their pairs."""
    def order(topic):
        return hashlib.sha256(f"{seed}/{topic}".encode()).hexdigest()

    topics = sorted({pair["topic"] for pair in pairs}, key=order)
    held = set(topics[:max(1, round(share * len(topics)))])
    return [p for p in pairs if p["topic"] not in held], [p for p in pairs if p["topic"] in held]


def mean_words(pairs, side):
    return sum(len(p[side][0]["content"].split()) for p in pairs) / max(1, len(pairs))


def main():
    args = parse_args()
    rows, groups = read_groups(args.inp)
    groups = dict(list(groups.items())[:args.limit])
    if args.eval_prompts:
        both = leaked(groups, read_jsonl(args.eval_prompts, {"prompt": (str, list)}))
        if both:
            die(f"{args.eval_prompts}: expected no prompt, topic or wording of --in, "
                f"found {len(both)}: {', '.join(both)}")
    pairs, prompts, unused = facttune(groups, args.reward, args.k, args.margin)
    held = []
    if args.eval_out:
        pairs, held = split_topics(pairs, args.holdout, args.seed)
    chosen, rejected = mean_words(pairs, "chosen"), mean_words(pairs, "rejected")
    report(prompts_in=len(groups), **{f"  {name}": n for name, n in sorted(prompts.items())},
           responses_in=sum(map(len, groups.values())),
           **{f"  {reason}": n for reason, n in sorted(unused.items())},
           pairs=len(pairs), pairs_held_out=len(held),
           pairs_a_prompt=round((len(pairs) + len(held)) / max(1, prompts["used"]), 2),
           words_chosen=round(chosen, 1), words_rejected=round(rejected, 1))
    if not pairs:
        die("no pairs to train on: --eval-out took the only topic with any" if held else
            "no pairs: no prompt has two usable responses that score differently. Sample more "
            "(01_generate.py --n)")
    if max(chosen, rejected) > LONGER * min(chosen, rejected):
        print("warning: chosen and rejected differ in length by more than 20 %: training on them "
              "moves the length of responses too", file=sys.stderr)
    for path in filter(None, (args.out, args.eval_out)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    memo, text = same_run(Path(args.out), args, rows)
    write_whole(memo, text)
    for path, made in ((args.eval_out, held), (args.out, pairs)):
        if path:
            write_whole(path, "".join(dumps(pair) + "\n" for pair in made))
    return 0


if __name__ == "__main__":
    run(main)
