"""
Stage 4. Turn responses into training rows: one sub-command a rule.

facttune   pairs (2311.08401): of the responses to one prompt, the top-scored is preferred to each
           that scores lower (--pairs best), or of any two the higher-scored (all: its code). FS:
           precision, S/(S+NS), or F1@K; MC: the mean confidence, of 03 --method confidence
flame-sft  targets (2405.01525, 4.2): own responses to fact-based prompts, --given ones to others
flame      pairs (4.3): highest over lowest rating (kind "if"); of a fact-based prompt also highest
           over lowest precision (kind "fact"), where the two ratings differ by 0.5 at most
factalign  single responses (2410.01691, 4.1): good where F1@K > t; their sentences: good where the
           share of S among the facts is at least t_s, unlabelled without facts or with a null
apeft      pairs (2406.12416): D_g, facttune's (kind "fact"), and D_a (kind "atomic"): for each
           question that a fact of D_g's responses asks, and that the model half knows (0 < r < 1,
           by 03 --method answers), its commonest right answer over its commonest wrong one
sft, rft   targets: every response; the top-scored one, the first of equals (RAFT, 2304.06767)

Reads   verified.jsonl   03's rows: {"id", "prompt_id", "topic", "prompt", "response", "finish",
                         "sentences": [{"start", "end", "facts": [{"text", "label"}]}]}; for flame
                         with "rating", for apeft with "r" and "answers"; for sft 02's will do.
                         FactAlign's later rounds: the files of all rounds, one after the other
Writes  prefs.jsonl      whole; TRL's trainers for DPO, KTO and SFT read it unchanged. A pair:
  {"id": "fiji-geo/3>fiji-geo/0", "prompt_id": "fiji-geo", "topic": "Fiji", "kind": "fact",
   "prompt": [{"role": "user", "content": "In three ..."}], "from": ["fiji-geo/3", "fiji-geo/0"],
   "chosen": [{"role": "assistant", "content": "Fiji is an island ..."}],
   "rejected": [{"role": "assistant", "content": "Fiji is a landlocked ..."}],
   "score_chosen": 0.5, "score_rejected": 0.0, "finish": {"chosen": "stop", "rejected": "length"}}
  A single response has "completion", factalign's also "label", "completion_sentences",
  "sentence_label", "sentence_spans". An atomic pair's prompt is the one that its answers were
  sampled for; a "prefix" that they went on from opens both sides, and 05 trains on what follows it,
  without an end of turn.

The text trained on is the response up to its last whole sentence. Its finish is "stop" where the
model ended its turn right there: only then does 05 append the end-of-turn token and train on it.
What makes no row is counted by its reason. A response: abstains, has more than 20 % null labels or
none that is S or NS (sft does not ask), has no whole sentence, has one 10-gram more than 5 times
(FactAlign's code), or repeats another response to its prompt. A prompt: has too few usable ones
("few": what compares them needs two), or they all score alike ("tied"). factalign labels bad what
abstains, states no fact or repeats itself. What 03 marks "repeats" counts in no score.

Not as in the papers: FactAlign's code counts irrelevant facts as false; here they leave F1@K alone.
Where the sides of APEFT's atomic pairs come from we found nowhere: ours are the model's own answers
(--keep unknown, known: or a fact's own words).

  python 04_build_prefs.py facttune --in runs/x/verified.jsonl --out runs/x/prefs.jsonl \\
      --eval-out runs/x/prefs_heldout.jsonl --eval-prompts data/prompts_eval.jsonl
  python 04_build_prefs.py factalign --in runs/dev/verified.jsonl --out runs/dev/kto.jsonl --balance
"""
import argparse
import gc
import hashlib
import json
import sys
from bisect import bisect_right
from collections import Counter
from itertools import permutations
from pathlib import Path
from statistics import fmean

from common import (as_messages, die, dumps, is_prompt, read_jsonl, report, run, same_run,
                    write_whole)

PROTOCOL = json.loads((Path(__file__).parent / "data/protocol.json").read_text(encoding="utf-8"))
CONFIDENCE = ("max", "exp", "neg_ent")  # FactTune-MC's scores
MAX_NULL = 0.2   # above this share of unjudged facts a response has no score
MAX_REPEATS = 5  # FactAlign's notebook: one 10-gram more often than this, and the label is false
MAX_GAP = 0.5    # FLAME, section 4.3: between the ratings of a factual pair
LONGER = 1.2     # summed log-probs learn length when one side is much longer
NUMBER = (int, float, type(None))


def parse_args():
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--in", dest="inp", nargs="+", required=True, metavar="FILE", help="03's rows (sft: 02's)")
    add("--out", required=True, metavar="FILE", help="JSONL to write")
    add("--only", choices=["fact", "atomic", "if", "general"], help="ablation: one kind of rows")
    add("--eval-prompts", metavar="FILE", help="refuse the prompts and topics in there")
    add("--eval-out", metavar="FILE", help="set some topics aside there, to evaluate 05 on")
    add("--holdout", type=float, default=0.1, help="share of the topics set aside")
    add("--seed", type=int, default=0, help="which topics are set aside")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--overwrite", action="store_true", help="replace an OUT made with other flags")
    k, scored, paired = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    k.add_argument("--k", type=int, default=PROTOCOL["k"],
                   help="K of F1@K (default: data/protocol.json's; FactAlign's own: 100)")
    scored.add_argument("--reward", default="precision", choices=["precision", "f1", *CONFIDENCE],
                        help="FactTune-FS: precision; F1@K; FactTune-MC: a confidence")
    add = paired.add_argument
    add("--pairs", default="best", choices=["best", "all"], help="best against rest, or any two")
    add("--margin", type=float, default=0.0, help="scores must differ by more (FactTune: 0)")
    add("--unpaired", action="store_true", help="each side once as a labelled row, for 05's kto")
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(reward=None, k=None, margin=0.0, unpaired=None, t=0.0, t_s=0.0, given=None,
                   precision_share=0.0, general=None, answers=None)  # of rules without such flags
    rules = p.add_subparsers(dest="rule", required=True)
    rules.add_parser("facttune", parents=[shared, k, scored, paired], help="pairs")
    rules.add_parser("sft", parents=[shared], help="all responses as targets")
    rules.add_parser("rft", parents=[shared, k, scored], help="the best response as target")
    add = rules.add_parser("flame-sft", parents=[shared], help="own and given targets").add_argument
    add("--given", required=True, metavar="FILE", help='rows with "prompt" and "response"')
    add("--targets", default="own", choices=["own", "given"], help="of fact-based prompts")
    rules.add_parser("flame", parents=[shared], help="pairs by rating and by precision")
    add = rules.add_parser("factalign", parents=[shared, k], help="labelled responses").add_argument
    add("--t", type=float, default=0.75, help="a response is good above (paper: 0.75)")
    add("--t-s", type=float, default=1.0, help="a sentence is good from here on (paper: 1.0)")
    add("--balance", action="store_true", help="choose t: half the responses are good (its code)")
    add("--precision-share", type=float, default=0.0, metavar="P", help="label this share of the "
        "prompts by precision and the others by recall@K (Figure 3)")
    add("--general", metavar="FILE", help="rows of other abilities: 03's ratings, or "
        "HuggingFaceH4/ultrafeedback_binarized:train_prefs, trl-lib/kto-mix-14k:train")
    add = rules.add_parser("apeft", parents=[shared, k, scored, paired], help="pairs").add_argument
    add("--answers", required=True, metavar="FILE", help="01's, which 03 judged")
    add("--keep", default="potentially", choices=["unknown", "potentially", "known"],
        help="facts of D_a, by what the model knows (paper: potentially)")
    args = p.parse_args()
    if any(n is not None and n < 1 for n in (args.k, args.limit)):
        die("expected --k and --limit of at least 1")
    if not (0 <= args.margin < 1 and 0 < args.holdout < 1 and 0 <= args.t < 1 and 0 <= args.t_s <= 1
            and 0 <= args.precision_share <= 1):
        die("expected --margin, --holdout, --t, --t-s and --precision-share between 0 and 1")
    files = [f for f in (*args.inp, args.out, args.eval_out, args.eval_prompts, args.given,
                         args.general, args.answers) if f]
    if len({Path(f).resolve() for f in files}) < len(files):
        die("expected different files for all flags that take one")
    return args


# ---------------------------------------------------------------------------------------------
# One response: what of it is trained on, and its score

def topic_of(row):
    return str(row.get("topic") or row.get("prompt_id") or row["id"])


def question_of(row):
    """What joins a fact and the answers to it: 02's question, or its prefix to go on from."""
    return str(row.get("question") or row.get("prefix"))


def facts_of(row):
    return [fact for sentence in row["sentences"] for fact in sentence["facts"]]


def training_text(row):
    """(text, finish): the response up to its last whole sentence, and whether a turn ends there.
    02 lists the unfinished last sentence of a cut response, too: it reaches the end, and goes."""
    sentences, whole = row["sentences"], len(row["response"].rstrip())
    if row["finish"] == "length" and sentences and sentences[-1]["end"] >= whole:
        sentences = sentences[:-1]
    if not sentences:
        return "", "length"
    start, end = sentences[0]["start"], sentences[-1]["end"]
    ended = row["finish"] == "stop" and end >= whole
    return row["response"][start:end], "stop" if ended else "length"


def repeats(text, n=10):
    """How often the commonest n-gram of words occurs."""
    words = text.lower().split()
    return max(Counter(zip(*(words[i:] for i in range(n)))).values(), default=0)


def verdicts(row, reward):
    """What a reward is made of: one label or confidence a fact, or the rating; None: not judged."""
    if reward == "rating":
        return [row["rating"]]
    facts = [fact for fact in facts_of(row) if not fact.get("repeats")]
    if reward in CONFIDENCE:  # facts that ask nothing have none
        return [fact["conf"] and fact["conf"][reward] for fact in facts if "conf" in fact]
    return [fact["label"] for fact in facts]


def score(found, reward, k=1):
    """precision = S/(S+NS), recall = min(S/K, 1), f1 = F1@K, their harmonic mean (SAFE); the mean
    of confidences or of the rating. None where nothing was judged."""
    if reward in (*CONFIDENCE, "rating"):
        known = [value for value in found if value is not None]
        return fmean(known) if known else None
    s, judged = found.count("S"), found.count("S") + found.count("NS")
    # each is one quotient: equal scores are equal floats
    return {"precision": s / judged, "recall": min(s / k, 1.0),
            "f1": 2 * s / (judged + max(k, s))}[reward] if judged else None


def target(row, text, finish, kind="fact", **more):
    """A training row with one response."""
    return {"id": row["id"], "prompt_id": str(row.get("prompt_id") or row["id"]),
            "topic": topic_of(row), "kind": kind, "prompt": as_messages(row["prompt"]),
            "completion": [{"role": "assistant", "content": text}], "finish": finish, **more}


def candidates(rows, reward=None, k=1, bad_too=False):
    """(usable responses to a prompt, as target rows; why the others are not usable).
    Without a reward no verdict is looked at and the rows have no score. bad_too: what abstains,
    states nothing or repeats itself is usable, with a score of 0."""
    found, unused = {}, []
    for row in rows:
        seen = verdicts(row, reward) if reward else []
        value = score(seen, reward, k) if reward else None
        text, finish = training_text(row)
        bad = ("abstained" if row.get("abstained") else
               "no_fact" if reward and value is None else
               "repetitive" if repeats(text) > MAX_REPEATS else None)
        reason = ("unjudged" if seen.count(None) > MAX_NULL * len(seen) else
                  "no_sentence" if not text.strip() else
                  "duplicate" if text in found else None if bad_too else bad)
        if reason:
            unused.append(reason)
        else:
            scored = {"score": 0.0 if bad else value} if reward else {}
            found[text] = target(row, text, finish, **scored)
    return list(found.values()), unused


def pair(chosen, rejected, kind="fact"):
    """The training row that prefers one usable response to another."""
    return {"id": f"{chosen['id']}>{rejected['id']}" + f" {kind}" * (kind != "fact"),
            "prompt_id": chosen["prompt_id"], "topic": chosen["topic"], "kind": kind,
            "prompt": chosen["prompt"], "from": [chosen["id"], rejected["id"]],
            "chosen": chosen["completion"], "rejected": rejected["completion"],
            "score_chosen": chosen["score"], "score_rejected": rejected["score"],
            "finish": {"chosen": chosen["finish"], "rejected": rejected["finish"]}}


def sides(row):
    """{name: single response} of what a training row sets against something else."""
    if "chosen" not in row:
        return {{True: "good", False: "bad"}.get(row.get("label"), "completion"): row}
    return {side: {"completion": row[side], "finish": row["finish"][side],
                   "label": side == "chosen", "score": row[f"score_{side}"]}
            for side in ("chosen", "rejected")}


def unpaired(pairs):
    """KTO on pairs: each response once where it is chosen (good), once where it is rejected."""
    found, fields = {}, ("prompt_id", "topic", "kind", "prompt", "prefix")
    for row in pairs:
        for name, (side, said) in zip(row["from"], sides(row).items()):
            kept = {field: row[field] for field in fields if field in row}
            found.setdefault((name, side), {"id": f"{name} {side}", **kept, **said})
    return list(found.values())


# ---------------------------------------------------------------------------------------------
# The rules: (training rows, Counter of what became of prompts, Counter of why responses are unused)

def preferences(responses, margin=0.0, pairs="best"):
    """[(chosen, rejected)], scores > margin apart: of any two (pairs "all"), of the best and each
    other ("best"), of the best and the worst ("extremes"); of equals the first is taken."""
    best, worst = (end(responses, key=lambda r: r["score"], default=None) for end in (max, min))
    return [(a, b) for a, b in permutations(responses, 2)
            if (pairs == "all" or a is best and (pairs == "best" or b is worst))
            and round(a["score"] - b["score"], 9) > margin]  # in floats, 0.4 - 0.3 > 0.1


def by_prompt(groups, make, *how, name=""):
    """A rule that makes its rows of the usable responses to one prompt at a time; what it counts
    has a name in front, where a paper has two such rules."""
    made, prompts, unused = [], Counter(), Counter()
    for rows in groups.values():
        responses, reasons = candidates(rows, *how)
        found = make(responses)
        prompts[name + ("used" if found else "tied" if len(responses) > 1 else "few")] += 1
        unused.update(name + reason for reason in reasons)
        made += found
    return made, prompts, unused


def facttune(groups, reward="precision", k=1, margin=0.0, pairs="best", kind="fact", name=""):
    """FactTune (2311.08401): of two responses to a prompt, the more factual one is preferred, by
    the verdicts (FS) or by how sure the model is of what it says, right or wrong (MC)."""
    return by_prompt(groups, lambda found: [
        pair(*two, kind) for two in preferences(found, margin, pairs)], reward, k, name=name)


def sft(groups):
    """FactTune's first stage: every response is a target."""
    return by_prompt(groups, list)


def rft(groups, reward="precision", k=1):
    """RAFT (2304.06767): the best response is the target, where it beats any other."""
    return by_prompt(groups, lambda found: [
        best for best, _ in preferences(found, pairs="extremes")], reward, k)


def fact_based(groups):
    return {name: rows for name, rows in groups.items() if rows[0].get("fact_based")}


def flame_sft(groups, given, targets="own"):
    """FLAME (2405.01525, section 4.2): what a person knows and the model does not teaches it to
    make things up; so of a fact-based prompt the targets are its own responses."""
    made, prompts, unused = sft(fact_based(groups) if targets == "own" else {})
    prompts["not_asked"] = len(groups) - prompts.total()
    made += [target(row, row["response"], "stop", "fact" if row.get("fact_based") else "if")
             for row in given if targets == "given" or not row.get("fact_based")]
    return made, prompts, unused


def flame(groups):
    """FLAME (section 4.3): pairs of the two extremes of a prompt, by rating and by precision."""
    follow, *told = facttune(groups, "rating", pairs="extremes", kind="if", name="if_")
    facts, *more = facttune(fact_based(groups), pairs="extremes", name="fact_")
    rating = {row["id"]: row["rating"] for rows in groups.values() for row in rows
              if row["rating"] is not None}
    near = [row for row in facts for a, b in [row["from"]] if {a, b} <= rating.keys()
            and round(abs(rating[a] - rating[b]), 9) <= MAX_GAP]
    more[0].update(fact_used=len(near) - len(facts), fact_far=len(facts) - len(near))
    return follow + near, told[0] + more[0], told[1] + more[1]


def threshold(scores):
    """The score above which as near to half of them lie as can be."""
    ranked = sorted(scores)
    return min(ranked, key=lambda t: abs(len(ranked) - 2 * bisect_right(ranked, t)), default=0.0)


def sentence_columns(sentences, text, t_s):
    """What fKTO needs of a response's training text: sentences, labels and spans, None without any.
    Is the share of S among a sentence's facts at least t_s? (The paper's > would let none through
    at 1.) As in FactAlign's code what was said before, and a 10-gram more than 3 times, is bad.
    Without facts, or with a null among them: no label."""
    found, said = [], set()
    for s in sentences:
        start, end = (s[name] - sentences[0]["start"] for name in ("start", "end"))
        if end > len(text):
            break  # cut
        words, labels = text[start:end], [fact["label"] for fact in s["facts"]]
        if words in said or repeats(words) > 3:
            found.append((words, False, (start, end)))
        elif labels and None not in labels:
            found.append((words, labels.count("S") / len(labels) >= t_s, (start, end)))
        said.add(words)
    columns = map(list, zip(*found)) if found else [None] * 3
    return dict(zip(("completion_sentences", "sentence_label", "sentence_spans"), columns))


def factalign(groups, k, t=0.75, t_s=1.0, balance=False, precision_share=0.0, seed=0, more=()):
    """FactAlign (2410.01691, section 4.1): labels for KTO on responses and fKTO on sentences; and
    rows of `more`, which are about something else."""
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    n = round(precision_share * len(order))
    parts = {"precision": order[:n], "recall": order[n:]} if precision_share else {"f1": groups}
    sentences = {row["id"]: row["sentences"] for rows in groups.values() for row in rows}
    made, prompts, unused = [], Counter(), Counter()
    for metric, names in parts.items():
        found, *counts = by_prompt({name: groups[name] for name in names}, list, metric, k, True)
        prompts, unused = prompts + counts[0], unused + counts[1]
        t = threshold([row["score"] for row in found]) if balance else t
        made += [{**row, "t": t, "label": row["score"] > t, **sentence_columns(
            sentences[row["id"]], row["completion"][0]["content"], t_s)} for row in found]
    return made + [part for row in more for part in general(row)], prompts, unused


def general(row):
    """KTO rows of a row of general data: a response rated 4 or more (good) or 2 or less, both sides
    of a pair, which may repeat the prompt (UltraFeedback-binarized), a labelled one (kto-mix).
    None where the row is none of these."""
    said_by = [row[name] for name in ("prompt", "chosen", "rejected", "completion") if name in row]
    finish = row.get("finish", "stop")
    if not all(map(is_prompt, said_by)) or finish not in ("stop", "length"):
        return None
    match row:
        case {"prompt": str() | list(), "rating": int() | float() | None as rating,
              "response": str(said)}:
            if not said.strip() or 2 < (rating or 3) < 4:
                return []
            return [target(row, said.strip(), finish, "general", label=rating >= 4)]
        case {"prompt": str() | list() as prompt, "chosen": [*_, {"content": str()}],
              "rejected": [*_, {"content": str()}]}:
            return [target({**row, "id": f"{row['id']}/{side}", "prompt": row[side][:-1] or prompt},
                           row[side][-1]["content"], "stop", "general", label=side == "chosen")
                    for side in ("chosen", "rejected") if row["chosen"] != row["rejected"]]
        case {"prompt": str() | list(), "completion": [*_, {"content": str(said)}],
              "label": bool(label)}:
            return [target(row, said, finish, "general", label=label)]


def apeft(groups, answers, keep="potentially", **how):
    """APEFT (2406.12416): D_g, facttune's pairs, and D_a, a pair for each question that a fact of
    D_g's responses asks and that the model knows as `keep` says. answers: their rows of 01."""
    made, prompts, unused = facttune(groups, **how)
    said = {name for row in made for name in row["from"]}
    asked = {(row["topic"], question_of(row)): row for row in answers}
    questions = {}
    for row in [row for rows in groups.values() for row in rows if row["id"] in said]:
        for fact in facts_of(row):
            name = topic_of(row), question_of(fact)
            if name in asked and fact.get("known"):
                questions.setdefault(name, []).append(fact)
    for name, facts in questions.items():
        known, found = facts[0]["known"], atomic(asked[name], facts)
        if known == keep and found:
            made.append(found)
            known += "_used"
        prompts[f"facts_{known}"] += 1
    return made, prompts, unused


def atomic(asked, facts):
    """The pair of a question: the commonest right answer over the commonest wrong one, which the
    model gave to this very prompt, after this prefix; without one, what a fact that asks it says.
    None where a side is missing."""
    name, prefix, said = asked["prompt_id"], asked.get("prefix") or "", {}
    own = [{"text": fact["answer"], "label": fact.get("label"), "count": 0}
           for fact in facts if "answer" in fact]
    for answer in sorted(facts[0]["answers"] + own, key=lambda one: one["count"], reverse=True):
        said.setdefault(answer["label"], answer["text"])
    if not (said.get("S") and said.get("NS")):
        return None
    right, wrong = [
        target({**asked, "id": f"{name} {side}"}, f"{prefix} {said[label]}".strip(), "length",
               score=value) for side, label, value in (("right", "S", 1.0), ("wrong", "NS", 0.0))]
    return {**pair(right, wrong, "atomic"), "id": name, "prefix": prefix, "r": facts[0]["r"]}


RULES = {
    "facttune": lambda groups, _, a: facttune(groups, a.reward, a.k, a.margin, a.pairs),
    "sft": lambda groups, _, a: sft(groups),
    "rft": lambda groups, _, a: rft(groups, a.reward, a.k),
    "flame-sft": lambda groups, given, a: flame_sft(groups, given, a.targets),
    "flame": lambda groups, _, a: flame(groups),
    "factalign": lambda groups, more, a: factalign(groups, a.k, a.t, a.t_s, a.balance,
                                                   a.precision_share, a.seed, more),
    "apeft": lambda groups, answers, a: apeft(groups, answers, a.keep, reward=a.reward, k=a.k,
                                              margin=a.margin, pairs=a.pairs)}


# ---------------------------------------------------------------------------------------------
# Reading, and what is told

def labelled(one, needed=True):
    """Is this a text with a label: a fact or an answer?"""
    return (isinstance(one, dict) and isinstance(one.get("text"), str)
            and one.get("label", "none" if needed else None) in ("S", "NS", "IR", None))


def fault(row, args):
    """What was expected inside a row of 02 or 03 and is not there; None where all is."""
    if row.get("finish") not in ("stop", "length"):
        return f"'finish' as stop or length (01_generate.py), not {row.get('finish')!r:.60}"
    if args.rule == "flame" and not isinstance(row.get("rating", ""), NUMBER):
        return "a 'rating' (03_verify.py --method rate)"
    judged = not (args.rule in ("sft", "flame-sft") or args.reward in CONFIDENCE
                  or args.rule == "flame" and not row.get("fact_based"))
    for s in row["sentences"]:
        if not (isinstance(s, dict) and isinstance(s.get("facts"), list)
                and type(s.get("start")) is int and type(s.get("end")) is int
                and 0 <= s["start"] <= s["end"] <= len(row["response"])):
            return f"a sentence as {{start, end, facts}} within the response, not {s!r:.60}"
        for fact in s["facts"]:
            if not labelled(fact, judged):
                return f"a fact as {{text, label: S|NS|IR|null}} (03_verify.py), not {fact!r:.60}"
            conf, answers = fact.get("conf"), fact.get("answers") or []
            if not (isinstance(answers, list) and all(
                        labelled(one) and isinstance(one.get("count"), int) for one in answers)
                    and (answers and "r" in fact or not fact.get("known"))
                    and (conf is None or isinstance(conf, dict) and all(
                        isinstance(conf.get(name, ""), NUMBER) for name in CONFIDENCE))):
                return f"'conf' and 'answers' as 03_verify.py writes them, not {fact!r:.60}"
            fact.pop("evidence", None)  # half of the memory; no rule looks at it


def read_groups(args):
    """(all rows, {prompt_id: its rows} of the first --limit) of --in, every row checked."""
    fields = {"prompt_id": str, "prompt": (str, list), "response": str, "sentences": list}
    made_by = "02_decompose.py" if args.rule in ("sft", "flame-sft") else "03_verify.py"
    rows, groups, files, asked = [], {}, {}, {}

    def wrong(row):
        prompt = row["prompt"], topic_of(row), bool(row.get("fact_based"))
        if files.setdefault(row["id"], path) != path:
            return "an id that no earlier file has"
        if asked.setdefault(row["prompt_id"], prompt) != prompt:
            return f"the prompt, topic and fact_based that {row['prompt_id']!r} had before"
        return fault(row, args)

    for path in args.inp:
        rows += read_jsonl(path, fields, made_by, parts=wrong)
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return rows, dict(list(groups.items())[:args.limit])


def read_more(args):
    """Rows of --given, --answers or --general; of the last NAME:SPLIT may be a dataset, too."""
    if args.given:
        return read_jsonl(args.given, {"prompt": (str, list), "response": str})
    if args.answers:
        return read_jsonl(args.answers, {"prompt": (str, list), "prompt_id": str, "topic": str})
    if not args.general:
        return []
    wanted = "a prompt, and a rated response, or chosen and rejected, or completion and label"
    name, _, split = args.general.rpartition(":")
    if not name or Path(args.general).is_file():
        return read_jsonl(args.general, parts=lambda row: general(row) is None and wanted)
    from datasets import load_dataset
    try:
        rows = [{"id": f"general-{n}", **row}
                for n, row in enumerate(load_dataset(name, split=split))]
    except (OSError, ValueError) as error:
        die(f"{args.general}: expected a file or a dataset's NAME:SPLIT, found: {error!s:.200}")
    for row in rows:
        if general(row) is None:
            die(f"{args.general}: expected {wanted}, found {dumps(row)[:60]!r}")
    return rows


def refuse_leaked(rows, path):
    """Exit 2 where `path` has the prompt of a row: its id, its topic or its wording."""
    prompts = read_jsonl(path, {"prompt": (str, list)})
    ids = {row["id"] for row in prompts}
    topics = {topic_of(row).casefold() for row in prompts}
    wordings = {dumps(as_messages(row["prompt"])) for row in prompts}
    both = sorted({row["prompt_id"] for row in rows if row["prompt_id"] in ids
                   or row["topic"].casefold() in topics or dumps(row["prompt"]) in wordings})
    if both:
        die(f"{path}: expected no prompt, topic or wording of the training rows, "
            f"found {len(both)}: {', '.join(both[:9])}")


def split_topics(rows, share, seed):
    """(train, held out): the topics that a hash puts first are held out, with all their rows."""
    topics = sorted({row["topic"] for row in rows},
                    key=lambda topic: hashlib.sha256(f"{seed}/{topic}".encode()).digest())
    held = set(topics[:max(1, round(share * len(topics)))])
    return [r for r in rows if r["topic"] not in held], [r for r in rows if r["topic"] in held]


def statistics(rows):
    """{side: its mean words, share that ends by "stop", mean score if any} of training rows."""
    found = {side: [] for side in ("chosen", "rejected", "good", "bad", "completion")}
    for row in rows:
        for side, said in sides(row).items():
            found[side].append(said)
    for side, said in found.items():
        columns = {"words": [len(row["completion"][0]["content"].split()) for row in said],
                   "stop": [row["finish"] == "stop" for row in said],
                   "score": [row["score"] for row in said if "score" in row]}
        found[side] = {name: round(fmean(column), 2) for name, column in columns.items() if column}
    return {side: numbers for side, numbers in found.items() if numbers}


def main():
    args = parse_args()
    gc.disable()  # rows hold no cycles: to look for some took a third of the time
    rows, groups = read_groups(args)
    more = read_more(args)
    memo = same_run(Path(args.out), args, rows + more)
    made, prompts, unused = RULES[args.rule](groups, more, args)
    if args.rule == "apeft" and not any(name.startswith("facts_") for name in prompts):
        die(f"{args.answers}: expected answers to what the facts of --in ask, and --in judged by "
            "03_verify.py --method answers, found none")
    made = unpaired(made) if args.unpaired else made
    made = [row for row in made if args.only in (None, row["kind"])]
    made.sort(key=lambda row: "prefix" not in row)  # `datasets` looks at 10 MB for columns
    if args.eval_prompts:
        refuse_leaked(made, args.eval_prompts)
    train, held = split_topics(made, args.holdout, args.seed) if args.eval_out else (made, [])
    kinds = Counter(row["kind"] for row in train)
    told = {kind: statistics([row for row in train if row["kind"] == kind]) for kind in kinds}
    if args.rule == "rft" and train:  # is the best longer than the others?
        asked = {row["prompt_id"]: groups[row["prompt_id"]] for row in train}
        usable, *_ = by_prompt(asked, list, args.reward, args.k)
        told["fact"]["usable"] = statistics(usable)["completion"]
    marks = {"rows": [row["label"] for row in train if "label" in row],
             "sentences": [mark for row in train for mark in row.get("sentence_label") or ()]}
    report(prompts_in=len(groups), **{f"  {name}": n for name, n in sorted(prompts.items())},
           responses_in=sum(map(len, groups.values())),
           **{f"  {reason}": n for reason, n in sorted(unused.items())},
           rows=len(train), **{f"  {kind}": n for kind, n in kinds.items()},
           rows_held_out=len(held),
           rows_a_prompt=round(len(made) / max(1, len({row["prompt_id"] for row in made})), 2),
           **{f"{name}_{word}": found.count(mark) for name, found in marks.items() if found
              for word, mark in (("good", True), ("bad", False))},
           **{f"t_{n}": t for n, t in enumerate(dict.fromkeys(r["t"] for r in train if "t" in r))},
           **{f"{name}_{side}" + f"_{kind}" * (len(told) > 1): n for kind, found in told.items()
              for side, numbers in found.items() for name, n in numbers.items()})
    if not train:
        die("no rows to train on, see the counts. More samples may help (01_generate.py --n), or, "
            "where next to nothing is supported, another judge: 03's rules know countries")
    sizes = [[numbers["words"] for numbers in found.values()] for found in told.values()]
    if any(max(words) > LONGER * min(words) for words in sizes):
        print("warning: what is set against each other differs in length by more than 20 %: "
              "training moves the length of responses, too", file=sys.stderr)
    if marks["rows"]:  # 05's flags that give both labels the same sum of weights
        print(*[f"--{'sentence-' * (name != 'rows')}undesirable-weight "
                f"{found.count(True) / found.count(False):.4f}"
                for name, found in marks.items() if {*found} == {True, False}])
    write_whole(*memo)
    if args.eval_out:
        write_whole(args.eval_out, rows=held)
    write_whole(args.out, rows=train)
    return 0


if __name__ == "__main__":
    run(main)
