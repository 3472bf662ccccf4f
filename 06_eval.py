"""
Stage 6. Score verified responses, compare models, question the checker, show what changed.

Reads   03's rows {"id", "prompt_id", "topic", "response", "finish", "abstained", "sentences":
        [{"facts": [{"text", "label", "kind", "human"?}]}]}, labels S, NS, IR or null; FActScore's
        human-labelled files go in as they are; shift, winrate, qa read 01's rows, plot 05's log
Writes  tables on stdout (compare also files), pictures; `score --json` prints one object:
  {"n_prompts": 104, "n_responses": 416, "n_topics": 26, "k": 5, "label": "label",
   "median_claims": 4.5, "metrics": {"f1_at_k": {"mean": 0.12, "lo": 0.10, "hi": 0.15}, ...},
   "by_kind": {"border": {"share": {"mean": 0.24, ...}, "precision": {"mean": 0.31, ...}}, ...}}

Every metric is a mean over a prompt's responses, then over prompts; pooled figures are called so.
Intervals are 95 % percentile bootstraps over topics: a topic's prompts are drawn together.
  * No fact labelled S or NS: F1@K 0, no precision. No label, and abstained or empty: not responded;
    "facts" is a mean over the others (FActScore's way), supported and unsupported facts over all,
    so that silence lowers them. Over 20 % of its facts null: unjudged, out of all figures made of
    labels. Facts that 03 marks "repeats" count as repeated only (by `human` labels alone: in full).
  * compare holds any other NAME against base and the better of base, base-cool and base-greedy,
    column by column; NAME-cool and NAME-greedy are rows without a verdict. To beat one it must
    state at least as many supported facts, and gain even if what it has no value for is 0.
  * calibration: facts that have both a confidence and a verdict (03 twice over the same rows).
  * shift: the tuned model's first choices along its greedy responses, ranked by the base.
  * winrate, two files: a judge sees rows of the same id and prompt in both orders; the mean is the
    preference of tuned (1 won, 1/2 tie, 0 lost). --out: AlpacaEval's annotations. Of verdicts: ties
    and first_place_wins (50 % is unbiased); of pairs: orders_disagree.
  * winrate, one file: MT-Bench's single rating, 1 to 10; a row's "reference" or "answer" is shown.
  * qa: rows with "label" 1 (a false premise) pass where the reply points it out, 0 where it answers
    and does not; "unknown" true where it says that nobody knows, false where an "answer" stands in
    it. hard: 1 and true; easy: 0 and false; balanced: their mean; precision, recall (it is hard),
    f1: of finding what is false or unknown. By phrases and a row's "check", a regex, or a judge.

Not as in the papers: SAFE and FactAlign count repeated facts again and fix K (64, 100); here K is
the base's median_claims (S+NS of its judged dev responses), rounded up, kept in data/protocol.json.
AlpacaEval asks once, in an order drawn by chance, and also has a rate that is controlled for
length; MT-Bench takes the first rating in a reply, here it must stand at its end.

  python 06_eval.py score --in runs/demo/base.jsonl
  python 06_eval.py compare base=b.jsonl base-cool=bc.jsonl tuned=t.jsonl --report page.html
  python 06_eval.py agreement --in runs/label/verified.jsonl --by half,kind
  python 06_eval.py calibration --in runs/dev/both.jsonl --out reliability.png
  python 06_eval.py shift in=greedy.jsonl ood=ood.jsonl --model runs/a/tuned --out shift.png
  python 06_eval.py winrate base=b.jsonl tuned=t.jsonl --model JUDGE --base-url URL
  python 06_eval.py qa base=b.jsonl tuned=t.jsonl
  python 06_eval.py plot dpo=runs/a/log.jsonl kto=runs/b/log.jsonl --out curves.png
"""
import argparse
import json
import math
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import fmean, median
from textwrap import shorten

from common import (as_messages, chat, chat_arguments, die, end_of_turn, last_line, load_model,
                    progress, prompt_ids, read_jsonl, report, run, template, workers, write_whole)
from data import pictures
from rules import ascii_lower

PROTOCOL = json.loads(Path(__file__).parent.joinpath("data", "protocol.json").read_text("utf-8"))
LABELS = ("S", "NS", "IR", None)
BASES = ("base", "base-cool", "base-greedy")
# Kinds of fact that are easy to farm: F1@K and precision are repeated without each of these groups
WITHOUT = {"border_direction": ("border", "direction"), "region": ("region",), "vague": ("vague",),
           "membership": ("membership",)}
PLAIN = ("supported", "unsupported", "facts", "words", "words_base", "words_tuned", "ratio",
         "rating", "AUC")  # columns of plain numbers; the others are shares, in per cent
TABLE = ("f1_at_k", "precision", *PLAIN[:4], "responded", "repeated", "unjudged", "cut_by_length")
PAIRED = ("base", "tuned", "difference", "ratio", "headroom")
VERDICT = ("f1_at_k", "precision",
           "f1_at_k_without_border_direction", "precision_without_border_direction")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(p.add_subparsers(dest="command", required=True).add_parser, allow_abbrev=False)
    score = add("score", help="all metrics of one file")
    compare = add("compare", help="base and tuned in one table, and the verdict")
    compare.add_argument("--show", type=int, default=0, metavar="N", help="N prompts for the eye")
    compare.add_argument("--report", metavar="FILE", help="write a page of N, else 25, prompts")
    compare.add_argument("--out-md", metavar="FILE", help="write what is printed there too")
    compare.add_argument("--out-json", metavar="FILE", help="write the numbers there")
    compare.add_argument("--pictures", metavar="DIR", help="draw plane, prompts and facts there")
    agreement = add("agreement", help="a verifier's labels against human ones")
    agreement.add_argument("--by", default="", metavar="FIELD,...", help="of a fact or its row")
    calibration = add("calibration", help="confidence (FactTune-MC) against verdicts")
    shift = add("shift", help="where a tuned model's choices leave the base's (APEFT)")
    shift.add_argument("--model", required=True, help="the tuned one: FILE has its greedy rows")
    shift.add_argument("--base", default="data/world/model", help="the model before tuning")
    shift.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    plot = add("plot", help="training curves")
    winrate = add("winrate", help="a judge: tuned against base, or the rating of one file")
    winrate.add_argument("--out", metavar="FILE", help="AlpacaEval's annotations, of two files")
    qa = add("qa", help="are false premises pointed out, is the unknown owned up to?")
    for command in (winrate, qa):
        command.add_argument("--model", metavar="NAME", help="the judge, as its server calls it")
        command.add_argument("--max-tokens", type=int, default=1024, help="of a reply")
        command.add_argument("--concurrency", type=int, default=32, help="calls at a time")
        chat_arguments(command)
    for command in (score, agreement, calibration):
        command.add_argument("--in", dest="inp", required=True, metavar="FILE", help="03's rows")
    for command in (compare, shift, plot, winrate, qa):
        command.add_argument("files", nargs="+", metavar="NAME=FILE", help="base, tuned, ...")
    for command in (score, agreement, calibration, shift, winrate, qa):
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    for command in (calibration, shift, plot):
        command.add_argument("--out", required=command is plot, metavar="FILE",
                             help="picture to write: .png or .svg")
    for command in (score, compare):
        command.add_argument("--k", type=int, default=PROTOCOL["k"], help="of F1@K (protocol.json)")
    for command in (score, compare, calibration, shift, winrate, qa):
        command.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    args = p.parse_args()
    for flag, least in {"seed": 0, "show": 0, "k": 1, "max-tokens": 1, "concurrency": 1}.items():
        found = getattr(args, flag.replace("-", "_"), least)
        if found < least:
            die(f"expected --{flag} of at least {least}, found {found}")
    for flag in ("out", "out-md", "out-json", "report", "pictures"):  # before a judge is paid
        path = Path(getattr(args, flag.replace("-", "_"), None) or "-")
        taken = path.is_file() if flag == "pictures" else path.is_dir()
        if taken or any(part.is_file() for part in path.parents):
            die(f"expected another --{flag}: {path} cannot be written")
    picture = args.command != "winrate" and getattr(args, "out", None)
    if picture and not picture.endswith((".png", ".svg")):
        die(f"expected a .png or .svg as --out, found {args.out}")
    return args


# ---------------------------------------------------------------------------------------------
# From rows to the metrics of one response, then to means: each a ratio of two sums over topics

def read_facts(path):
    """03's rows or FActScore's own, each with all of its facts, checked, as "facts"."""
    def wrong(row):
        try:
            if "annotations" in row and "sentences" not in row:  # FActScore's; null: abstained
                row["abstained"] = row["annotations"] is None
                row["sentences"] = [{"facts": [
                    {"text": fact["text"], "human": fact["label"]}
                    for sentence in row["annotations"] or []
                    for fact in sentence["human-atomic-facts"] or []]}]
            row["facts"] = [fact for some in row["sentences"] for fact in some["facts"]]
            bad = [fact for fact in row["facts"]
                   if {type(fact["text"]), type(fact.get("kind", ""))} != {str}
                   or not {fact.get("label"), fact.get("human")} <= set(LABELS)
                   or not all(type(found) is dict for found in fact.get("evidence") or [])]
        except (KeyError, TypeError, AttributeError) as error:
            bad = [f"{type(error).__name__} {error}"]
        return bad and ("'sentences' of 'facts' with text and label S, NS, IR or null "
                          f"(03_verify.py writes them), not {bad[0]!r:.80}")
    return read_jsonl(path, {"response": str}, made_by="03_verify.py", parts=wrong)


def read_responses(path, k):
    """Responses {"prompt", "topic", "row", "label", "values"}: "label" or "human" scores them."""
    rows = read_facts(path)
    fields = {field for row in rows for fact in row["facts"] for field in fact}
    label = "human" if "human" in fields and "label" not in fields else "label"
    kinds = sorted({fact["kind"] for row in rows for fact in row["facts"] if "kind" in fact})
    for row in rows:
        if not all(label in fact for fact in row["facts"]):
            die(f"{path}: expected {label!r} in every fact (03_verify.py), not so in {row['id']!r}")
    return [{**case(row, measure(row, label, k, kinds)), "row": row, "label": label}
            for row in rows]


def case(row, values):
    """What means are made of: a row's prompt and topic, and its values."""
    prompt = str(row.get("prompt_id") or row["id"])
    return {"prompt": prompt, "topic": str(row.get("topic") or prompt), "values": values}


def ratio(a, b):
    return a / b if b else None


def f1_at_k(s, ns, k):
    """F1@K of precision s / (s + ns) and recall min(s / k, 1) (SAFE, arXiv 2403.18802)."""
    if s == 0:
        return 0.0
    precision, recall = s / (s + ns), min(s / k, 1.0)
    return 2 * precision * recall / (precision + recall)


def length_penalty(n, gamma=10):
    """FActScore's factor for a response of n facts (arXiv 2305.14251, as its code has it)."""
    return 1.0 if n > gamma else math.exp(1 - gamma / max(n, 1))


def rates(facts, k):
    """What labels say of [(label, kind)]; None where nothing, all None where > 20 % are null."""
    s, ns, ir, null = (sum(label == wanted for label, _ in facts) for wanted in LABELS)
    n = s + ns + ir
    found = {"f1_at_k": f1_at_k(s, ns, k), "f1_at_2k": f1_at_k(s, ns, 2 * k),
             "precision": ratio(s, s + ns), "recall_at_k": min(s / k, 1.0),
             "supported": s, "unsupported": ns, "irrelevant": ratio(ir, n),
             "factscore": ratio(s, n), "factscore_penalised": ratio(s * length_penalty(n), n)}
    return dict.fromkeys(found) if 5 * null > len(facts) else found


def spoken(response):
    """A response without its reasoning block, which 02 passes over, too."""
    return re.sub(r"^\s*<think>.*?(</think>|$)", "", response, flags=re.DOTALL).strip()


def measure(row, label, k, kinds):
    """{metric, or (kind, "share" or "precision"): value} of one response; None: it has none."""
    said = row["facts"]
    facts = [(fact[label], fact.get("kind")) for fact in said
             if label == "human" or not fact.get("repeats")]
    values = rates(facts, k)
    unjudged = values["supported"] is None
    for name, left_out in WITHOUT.items():
        part = rates([fact for fact in facts if unjudged or fact[1] not in left_out], k)
        for metric in ("f1_at_k", "precision"):
            values[f"{metric}_without_{name}"] = part[metric] if kinds else None
    for kind in kinds:
        part = [fact for fact in facts if fact[1] == kind]
        values[kind, "share"] = ratio(len(part), len(facts))
        values[kind, "precision"] = rates(facts if unjudged else part, k)["precision"]
    words = spoken(row["response"]).split()
    responded = any(fact[0] for fact in facts) or bool(words) and not row.get("abstained")
    repeated = ratio(len(said) - len(facts), len(said)) if label == "label" else None
    return values | {"facts": len(facts) if responded else None, "words": len(words),
                     "responded": responded, "repeated": repeated, "unjudged": unjudged,
                     "cut_by_length": row["finish"] == "length" if "finish" in row else None}


def estimate(topic_of, num, den=None, seed=0, resamples=2000):
    """sum(num) / sum(den), each {prompt: number}, and its interval; without den the mean of num.
    No interval with one topic only, or where a resample has nothing to divide by."""
    import numpy as np
    sums = {}
    for prompt in num:
        above, below = sums.get(topic_of[prompt], (0, 0))
        sums[topic_of[prompt]] = above + num[prompt], below + (den[prompt] if den else 1)
    sums = np.array(list(sums.values()), float).reshape(-1, 2)  # (topics, 2)
    found = {"mean": ratio(*sums.sum(0).tolist()), "lo": None, "hi": None}
    if found["mean"] is not None and len(sums) > 1:
        picks = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
        above, below = sums[picks].sum(1).T  # (resamples,) each
        if below.all():
            found["lo"], found["hi"] = np.quantile(above / below, (0.025, 0.975)).tolist()
    return found


def by_prompt(responses, name, reduce=fmean):
    """{prompt: mean of a metric over its responses}; what has no value is left out."""
    found = {}
    for response in responses:
        if response["values"][name] is not None:
            found.setdefault(response["prompt"], []).append(response["values"][name])
    return {prompt: reduce(values) for prompt, values in found.items()}


def means(cases, names, seed=0):
    topic_of = {c["prompt"]: c["topic"] for c in cases}
    return {name: estimate(topic_of, by_prompt(cases, name), seed=seed) for name in names}


def summarise(responses, k, seed=0):
    """The object that `score --json` prints."""
    topic_of, metrics, by_kind = {r["prompt"]: r["topic"] for r in responses}, {}, {}
    claims = [r["values"]["supported"] + r["values"]["unsupported"] for r in responses
              if not r["values"]["unjudged"]]
    for name, found in means(responses, responses[0]["values"], seed).items():
        if found["mean"] is None:
            found["reason"] = f"none in {len(responses)} responses, {len(claims)} of them judged"
        if isinstance(name, tuple):
            by_kind.setdefault(name[0], {})[name[1]] = found
        else:
            metrics[name] = found
    s, ns = (by_prompt(responses, name, sum) for name in ("supported", "unsupported"))
    metrics["precision_pooled"] = estimate(topic_of, s, {p: s[p] + ns[p] for p in s}, seed)
    return {"n_prompts": len(topic_of), "n_responses": len(responses),
            "n_topics": len(set(topic_of.values())), "k": k, "label": responses[0]["label"],
            "median_claims": median(claims) if claims else None,
            "metrics": metrics, "by_kind": by_kind}


def cell(value, column):
    """What a table shows of a number, a text or a mean with its interval; "-" where none is."""
    if isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, float):
        return f"{value:.2f}"
    if not value or value["mean"] is None:
        return "-"
    scale, digits, unit = (1, 2, "") if column in PLAIN else (100, 1, " %")
    mean, *ends = (f"{value[part] * scale:.{digits}f}" for part in ("mean", "lo", "hi")
                   if value.get(part) is not None)
    return mean + unit + (f" [{', '.join(ends)}]" if ends else "")


def table(header, body):
    """A markdown table whose source is aligned."""
    body = [list(map(cell, line, header)) for line in body]
    widths = [max(map(len, items)) for items in zip(header, *body)]
    lines = [header, ["-" * width for width in widths], *body]
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines) + "\n"


def run_score(args):
    responses = read_responses(args.inp, args.k)
    found = summarise(responses, args.k, args.seed)
    text = f"{args.inp}: K = {args.k}, scored by {found['label']!r} of its facts\n\n"
    text += table(["metric", "mean [95 % interval]"], [
        [name, m.get("reason", cell(m, name))] for name, m in found["metrics"].items()])
    text += table(["kind", "share", "precision"], [
        [kind, *m.values()] for kind, m in found["by_kind"].items()])
    print(json.dumps(found, indent=1) if args.json else text)
    report(responses=len(responses), unjudged=sum(r["values"]["unjudged"] for r in responses),
           median_claims=found["median_claims"])


# ---------------------------------------------------------------------------------------------
# compare: tuned against the better of the base's decodings

def named(texts):
    """{NAME: FILE} of NAME=FILE arguments."""
    files = dict(text.partition("=")[::2] for text in texts)
    if len(files) < len(texts) or "" in (*files, *files.values()):
        die(f"expected NAME=FILE, each NAME once, found {' '.join(texts)}")
    return files


def best_of(responses):
    """Of each prompt the response with the highest F1@K, the first of equals."""
    judged = [r for r in responses if r["values"]["f1_at_k"] is not None]
    best = {}
    for response in sorted(judged, key=lambda r: -r["values"]["f1_at_k"]) + responses:
        best.setdefault(response["prompt"], response)
    return list(best.values())


def read_sets(args):
    """(sets {NAME: responses}, base's decodings first, then the best of base's samples; the names
    that are held against base)."""
    files = named(args.files)
    others = [name for name in files if name not in BASES]
    if "base" not in files or any(name.startswith("base") for name in others):
        die("expected NAME=FILE, base among them; of names in base... there are only "
            f"{', '.join(BASES)}; found {' '.join(args.files)}")
    sets = {name: read_responses(files[name], args.k) for name in BASES if name in files}
    times = Counter(r["prompt"] for r in sets["base"])
    sets[f"base best-of-{max(times.values())}"] = best_of(sets["base"])
    sets |= {name: read_responses(files[name], args.k) for name in others}
    for name, responses in sets.items():
        sets[name] = [r for r in responses if r["prompt"] in times]  # easy others lift no row
        if not sets[name]:
            die(f"{files[name]}: expected prompts of {files['base']}, found none of them")
    return sets, [name for name in others if not name.endswith(("-cool", "-greedy"))]


def paired(tuned, base, name, seed=0, resamples=2000):
    """Tuned against base in one column, on the prompts where both have a value. headroom: the part
    taken of best - base, best the mean over prompts of the best of the base's responses. beats: the
    gain is above 0 even where all that tuned has no value for, prompt or response, counts as 0."""
    def mean(num, den=None):
        return estimate({r["prompt"]: r["topic"] for r in base}, num, den, seed, resamples)

    t, b, best = by_prompt(tuned, name), by_prompt(base, name), by_prompt(base, name, max)
    t = {prompt: t[prompt] for prompt in b if prompt in t}
    gain = {prompt: t[prompt] - b[prompt] for prompt in t}
    zero = by_prompt([{**r, "values": {name: r["values"][name] or 0}} for r in tuned], name)
    worst = mean({prompt: zero.get(prompt, 0) - b[prompt] for prompt in b})
    return {"prompts": len(t), "base": mean({prompt: b[prompt] for prompt in t}), "tuned": mean(t),
            "difference": mean(gain), "ratio": mean(t, b),
            "headroom": mean(gain, {prompt: best[prompt] - b[prompt] for prompt in b}),
            "beats": (worst["lo"] or 0) > 0}


def verdicts(sets, rows, tuned, bases, seed):
    """Each tuned NAME against base sampled and the better of bases, column by column. fewer: it
    says fewer supported facts, a missing prompt none. Then it beats nothing."""
    for column in (name for name in VERDICT if rows["base"]["metrics"][name]["mean"] is not None):
        better = max(bases, key=lambda base: rows[base]["metrics"][column]["mean"] or 0)
        for name in tuned:
            for against in dict.fromkeys(("base", better)):
                row = paired(sets[name], sets[against], column, seed)
                said, other = (by_prompt(sets[side], "supported") for side in (name, against))
                row["fewer"] = sum(said.get(prompt, 0) for prompt in other) < sum(other.values())
                row["beats"] &= not row["fewer"]
                if against != "base":
                    row["headroom"] = None  # it is defined over the base's samples
                yield {"name": name, "column": column, "against": against,
                       "is_better": against == better, **row}


def tables(rows, found, bases):
    """Markdown of compare: rows {label: summary}, found the verdicts against bases."""
    body, supported = [], {name: row["metrics"]["supported"]["mean"] for name, row in rows.items()}
    for name, row in rows.items():
        line = [cell(row["metrics"][column], column) for column in TABLE]
        if None not in (supported[name], supported["base"]) and supported[name] < supported["base"]:
            line[:2] = [text + " †" for text in line[:2]]
        line[4:] = [text.split(" [")[0] for text in line[4:]]  # intervals for the main columns only
        body.append([name + " by human" * (row["label"] == "human"), row["n_prompts"], *line])
    text = table(["", "prompts", *TABLE], body)
    text += "† fewer supported facts: no win\n\n" if "†" in text else ""
    body, says = [], {True: "beats", False: "does not beat"}
    for row in found:
        verb = says[row["beats"]] if row["is_better"] else "against"
        body.append([f"{row['column']}: {row['name']} {verb} {row['against']}{' †' * row['fewer']}",
                     row["prompts"], *(row[part] for part in PAIRED)])
    if found:
        text += table(["verdict: against base's better decoding", "prompts", *PAIRED], body)
        if len(bases) < len(BASES):
            text += "without base-cool and base-greedy mere sharpening is not ruled out\n"
    return text


def spread(sets, n):
    """n prompts, evenly spread over those that all sets have."""
    asked, *others = ({r["prompt"]: None for r in responses} for responses in sets.values())
    shared = [prompt for prompt in asked if all(prompt in other for other in others)]
    n = min(n, len(shared))
    return [shared[i * len(shared) // n] for i in range(n)]


def side_by_side(sets, n):
    """Markdown of n prompts, spread over those of all sets: first responses, labelled facts."""
    first = {name: {r["prompt"]: r for r in reversed(sets[name])} for name in sets}
    for prompt in spread(sets, n):
        yield f"\n## {prompt}\n"
        for name in first:
            row, label = first[name][prompt]["row"], first[name][prompt]["label"]
            yield f"\n{name}: {' '.join(row['response'].split()) or '(empty)'}\n\n"
            for fact in row["facts"]:
                line = f"({fact.get('kind', '-')}) {fact['text']}"
                if fact[label] == "S" and fact.get("evidence"):
                    found = {"field": "passage", "text": "", **fact["evidence"][0]}
                    line = f"{shorten(line, 64)} <- {found['field']}: {found['text']}"
                yield f"    {fact[label] or '-':<3} {shorten(line, 92)}\n"


def draw(folder, sets, rows, tuned, k):
    """The pictures of compare."""
    f1 = {name: by_prompt(sets[name], "f1_at_k") for name in ("base", *tuned)}
    pairs = {name: [(f1["base"][prompt], f1[name][prompt]) for prompt in f1["base"]
                    if prompt in f1[name]] for name in tuned}
    counts = {name: [(r["values"]["supported"], r["values"]["unsupported"]) for r in sets[name]
                     if not r["values"]["unjudged"]] for name in f1}
    plane = pictures.plane({name: row["metrics"] for name, row in rows.items()}, k)
    pictures.save(plane, f"{folder}/plane.png")
    pictures.save(pictures.facts_per_response(counts), f"{folder}/facts.png")
    if tuned:
        pictures.save(pictures.before_after(pairs, k), f"{folder}/prompts.png")


def run_compare(args):
    sets, tuned = read_sets(args)
    rows = {name: summarise(responses, args.k, args.seed) for name, responses in sets.items()}
    prompts = {name: row["n_prompts"] for name, row in rows.items()}
    bases = [base for base in BASES if prompts.get(base) == prompts["base"]]  # with all its prompts
    found = list(verdicts(sets, rows, tuned, bases, args.seed))
    text = f"K = {args.k}; mean [95 % interval over topics], differences in points\n\n"
    text += tables(rows, found, bases)
    for name, some in sets.items():
        wanted = prompts["base"] * max(Counter(r["prompt"] for r in some).values())
        if len(some) < wanted:
            text += (f"{name}: {len(some)} of {wanted} responses. What failed is no random part: "
                     "run 01, 02, 03 again\n")
    text += "".join(side_by_side({name: sets[name] for name in ("base", *tuned)}, args.show))
    print(text, end="")
    numbers = json.dumps({"k": args.k, "rows": rows, "verdict": found}, indent=1) + "\n"
    for path, written in ((args.out_md, text), (args.out_json, numbers)):
        if path:
            write_whole(path, written)
    if args.report:
        shown = spread(sets, args.show or 25)
        write_whole(args.report, pictures.page(sets, rows, found, shown))
    if args.pictures:
        draw(args.pictures, sets, rows, tuned, args.k)
    made = {"table": args.out_md, "page": args.report, "pictures": args.pictures}
    report(files=len(args.files), prompts=prompts["base"], k=args.k,
           **{name: path for name, path in made.items() if path})


# ---------------------------------------------------------------------------------------------
# agreement: a verifier against people; calibration: confidence against a verifier

def agree(facts):
    """Agreement of label and human on S against not-S; null labels are counted apart."""
    cells = Counter((f["label"] == "S", f["human"] == "S") for f in facts if f["label"] is not None)
    tp, fp, fn, tn = (cells[a, b] for a, b in ((1, 1), (1, 0), (0, 1), (0, 0)))
    n, recall, specificity = tp + fp + fn + tn, ratio(tp, tp + fn), ratio(tn, tn + fp)
    chance = (tp + fp) * (tp + fn) + (tn + fn) * (tn + fp)  # n^2 times agreement by chance
    return {"facts": n, "null": len(facts) - n, "accuracy": ratio(tp + tn, n),
            "kappa": ratio(n * (tp + tn) - chance, n * n - chance), "always_ns": ratio(tn + fp, n),
            "recall": recall, "precision": ratio(tp, tp + fp),
            "balanced": None if None in (recall, specificity) else (recall + specificity) / 2,
            "tp": tp, "fp": fp, "fn": fn, "tn": tn}


def run_agreement(args):
    both = [{**row, **fact} for row in read_facts(args.inp) for fact in row["facts"]
            if "label" in fact and fact.get("human")]
    fields = dict.fromkeys(filter(None, args.by.split(",")))
    for field in ("human", *fields):
        if not any(field in fact for fact in both):
            die(f"{args.inp}: expected facts with 03's label, and {field!r}, found none")
    groups = {"all": both}
    for field in fields:
        for fact in both:
            groups.setdefault(f"{field} {fact.get(field)}", []).append(fact)
    found = {name: agree(facts) for name, facts in groups.items()}
    text = "S against not-S; tp: both say S, fp: only the verifier, fn: only the human\n\n"
    text += table(["", *found["all"]], [[name, *of.values()] for name, of in found.items()])
    print(json.dumps(found, indent=1) if args.json else text)
    report(facts=len(both), groups=len(found))


def calibrate(facts, seed=0, resamples=2000):
    """Does confidence foretell the verdict? Of [(topic, confidence in 0..1, supported)]: "auc", how
    often a supported fact is the more confident of two, ties half; "bins", tenths of confidence."""
    import numpy as np
    topics, conf, true = map(np.array, zip(*facts))

    def auc(at):  # of the facts with these numbers
        s, ns = conf[at][true[at]], np.sort(conf[at][~true[at]])
        wins = np.searchsorted(ns, s, "left") + np.searchsorted(ns, s, "right")  # each pair twice
        return ratio(float(wins.sum()), 2 * len(s) * len(ns))

    places = [np.flatnonzero(topics == topic) for topic in np.unique(topics)]
    area = {"mean": auc(np.arange(len(facts))), "lo": None, "hi": None}
    picks = np.random.default_rng(seed).integers(len(places), size=(resamples, len(places)))
    draws = [auc(np.concatenate([places[i] for i in pick])) for pick in picks]
    if len(places) > 1 and None not in draws:
        area["lo"], area["hi"] = np.quantile(draws, (0.025, 0.975)).tolist()
    bins = []
    for tenth in range(10):
        own = [fact for fact in facts if min(int(fact[1] * 10), 9) == tenth]
        if own:
            topic_of, level, good = (dict(enumerate(column)) for column in zip(*own))
            bins.append({"from": tenth / 10, "facts": len(own), "confidence": fmean(level.values()),
                         "precision": estimate(topic_of, good, seed=seed)})
    return {"auc": area, "bins": bins}


def scaled(conf):
    """FactTune-MC's confidences, each from 0 to 1: neg_ent as exp(neg_ent). None: they are not."""
    try:
        found = {"max": conf["max"], "exp": conf["exp"], "exp(neg_ent)": math.exp(conf["neg_ent"])}
        return found if all(0 <= value <= 1 for value in found.values()) else None
    except (KeyError, TypeError, OverflowError):
        return None


def run_calibration(args):
    rows = read_facts(args.inp)
    both = [(str(row.get("topic") or row["id"]), scaled(fact["conf"]), fact["label"] == "S")
            for row in rows for fact in row["facts"]
            if fact.get("conf") and fact.get("label") in ("S", "NS")]
    if not both or not all(conf for _, conf, _ in both):
        die(f"{args.inp}: expected facts with label S or NS and 'conf' of max, exp and neg_ent "
            f"(03_verify.py, for verdicts and with --method confidence), found {len(both)}")
    found = {name: calibrate([(topic, conf[name], true) for topic, conf, true in both], args.seed)
             for name in both[0][1]}
    text = f"{len(both)} facts with a verdict and a confidence\n\n"
    text += table(["", "AUC"], [[name, of["auc"]] for name, of in found.items()])
    text += table(["confidence", "from", "facts", "mean", "precision"], [
        [name, f"{b['from']:.1f}", b["facts"], b["confidence"], b["precision"]]
        for name, of in found.items() for b in of["bins"]])
    print(json.dumps(found, indent=1) if args.json else text)
    if args.out:
        bins = {name: of["bins"] for name, of in found.items()}
        pictures.save(pictures.reliability(bins), args.out)
    report(facts=len(both), left_out=sum(len(row["facts"]) for row in rows) - len(both))


# ---------------------------------------------------------------------------------------------
# shift: where a tuned model leaves the base; plot: how training went

SHIFT = ("unshifted", "marginal", "shifted")


def ranks(models, tokenizer, row, device):
    """(ranks, own) along a greedy response, both (its tokens,): the rank of the tuned model's first
    choice among the base's next tokens, 1 its likeliest; whether the response has that choice.
    models = (tuned, base), the end of turn counts as a token (URIAL, arXiv 2312.01552)."""
    import torch
    prompt = prompt_ids(tokenizer, as_messages(row["prompt"]), row.get("prefix", ""))
    said = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    said += [end_of_turn(tokenizer)] * (row["finish"] == "stop")
    ids = torch.tensor([prompt + said], device=device)
    with torch.inference_mode():
        tuned, base = (model(ids).logits[0, len(prompt) - 1:-1] for model in models)
    choice = tuned.argmax(-1, keepdim=True)
    found = 1 + (base > base.gather(-1, choice)).sum(-1)
    return found.tolist(), (choice[:, 0] == ids[0, len(prompt):]).tolist()


def shift_of(rows, found, seed=0):
    """Shares of unshifted (rank 1), marginal (2, 3) and shifted (> 3) tokens: means over prompts,
    and by position, pooled, in steps that double. found: the ranks of each row."""
    def shares(some):
        counts = Counter(SHIFT[(rank > 1) + (rank > 3)] for rank in some)
        return {name: counts[name] / len(some) for name in SHIFT}

    result = means([case(row, shares(of_row)) for row, of_row in zip(rows, found)], SHIFT, seed)
    steps = {}
    for of_row in found:
        for position, rank in enumerate(of_row, 1):
            steps.setdefault(position.bit_length(), []).append(rank)
    result["by_position"] = [{"from": 2 ** (step - 1), "to": 2 ** step - 1, "tokens": len(some),
                              **shares(some)} for step, some in sorted(steps.items())]
    return result


def run_shift(args):
    def wrong(row):
        greedy = isinstance(row.get("gen"), dict) and row["gen"].get("temperature") == 0
        return None if greedy else "a greedy response (--temperature 0)"
    fields, sets, found = {"prompt": (str, list), "response": str, "finish": str}, {}, {}
    for name, path in named(args.files).items():
        rows = read_jsonl(path, fields, "01_generate.py", parts=wrong)
        sets[name] = [row for row in rows if row["response"] or row["finish"] == "stop"]
        if not sets[name]:
            die(f"{name}: expected responses with something in them, found none")
    tuned, tokenizer, device = load_model(args.model, device=args.device)
    base = tuned if args.base == args.model else load_model(args.base, device=args.device)[0]
    for name, rows in sets.items():
        both = [ranks((tuned, base), tokenizer, row, device) for row in progress(rows)]
        same = fmean(token for _, own in both for token in own)
        if same < 0.9:
            die(f"{name}: expected greedy responses of {args.model}, found that only {same:.0%} of "
                "their tokens are its first choice")
        found[name] = shift_of(rows, [of_row for of_row, _ in both], args.seed)
    positions = {name: of["by_position"] for name, of in found.items()}
    text = f"{args.model} against {args.base}: rank of its choice 1, 2 to 3, more\n\n"
    text += table(["", *SHIFT], [[name, *map(of.get, SHIFT)] for name, of in found.items()])
    text += table(["position", "", "tokens", *SHIFT], [
        [f"{b['from']} to {b['to']}" if b["to"] > 1 else "1", name, b["tokens"],
         *({"mean": b[part]} for part in SHIFT)] for name, bs in positions.items() for b in bs])
    print(json.dumps(found, indent=1) if args.json else text)
    if args.out:
        pictures.save(pictures.shift_by_position(positions), args.out)
    report(files=len(sets), tokens=sum(b["tokens"] for bs in positions.values() for b in bs))


def run_plot(args):
    def wrong(row):
        fine = all(type(v) in (int, float) and abs(v) < 1e99 for k, v in row.items() if k != "id")
        return None if fine and {"loss", "eval_loss"} & set(row) else "finite numbers, also a loss"
    logs = {name: read_jsonl(path, {"step": int}, "05_train.py", parts=wrong)
            for name, path in named(args.files).items()}
    pictures.save(pictures.curves(logs), args.out)
    report(runs=len(logs), rows=sum(map(len, logs.values())))


# ---------------------------------------------------------------------------------------------
# winrate, qa: a judge, which of two responses is better, how good one is, what it owns up to

FIRST, YES = {"a": 1.0, "tie": 0.5, "b": 0.0}, {"yes": True, "no": False}  # a judge's [[words]]
PREFERRED = ("win_rate", "ties", "orders_disagree", "first_place_wins", "words_base", "words_tuned")
# What points out a false premise; what says that nobody knows, or gives no answer
REBUTS = re.compile(r"(?i)\b(?:false|incorrect|mistaken|misconception|no such|contrary to|"
                    r"not (?:true|correct|accurate|the case|actually)|there (?:is|are|was|were) no|"
                    r"(?:has|have|had) (?:no|never)|do(?:es)?(?: not|n't) (?:exist|have|share))\b")
UNSURE = re.compile(r"(?i)\bun(?:known|certain|knowable|predictable)|\b(?:impossible|hard) to\b|"
                    r"(?:not|n't) (?:yet |publicly )?(?:be )?(?:known?|certain|recorded|sure)\b|"
                    r"\b(?:no one|nobody) (?:knows|can)|\bno (?:record|way|reliable|definite)|"
                    r"\b(?:cannot|can not|can't|unable to|do not have|don't have|as an ai)\b|"
                    r"\b(?:i'm|i am) sorry\b|\bi apologi[sz]e")


def read_replies(path, parts=lambda row: None):
    """01's rows or later ones. Adds "shown", what a judge sees: all turns and the response; and
    "said", the response with plain apostrophes."""
    def wrong(row):
        turns, said = as_messages(row["prompt"]), spoken(row["response"])
        asked = "\n\n".join(f"{turn['role'].title()}: {turn['content']}" for turn in turns)
        row["said"] = said.replace("\u2019", "'")
        row["shown"] = {"prompt": asked if turns[1:] else turns[0]["content"],
                        "response": said or "(empty)"}
        try:
            return parts(row)
        except (TypeError, AttributeError, re.error, OverflowError, RecursionError):
            return "'check' as a regex, 'answer' as text or a list"
    return read_jsonl(path, {"prompt": (str, list), "response": str}, "01_generate.py", parts=wrong)


def chosen(reply, values):
    """The value of the word that a reply ends with, [[word]] in a line of its own."""
    form = rf"(?i)\W*(?:(?:final )?(?:verdict|answer)\W*)?\[\[({'|'.join(values)})\]\]\W*"
    found = re.fullmatch(form, last_line(reply))
    return found and values[found[1].lower()]


def mark(reply):
    """The one rating in its last line, as MT-Bench has it: [[7]], [[7.5]], or at worst [7]."""
    line = last_line(reply)
    found = re.findall(r"\[\[(\d+\.?\d*)\]\]", line) or re.findall(r"(?<!\w)\[(\d+\.?\d*)\]", line)
    return float(found[0]) if len(found) == 1 and 1 <= float(found[0]) <= 10 else None


def judged(args, questions, parse, stand_in):
    """([a verdict on each (template, fields)], what they cost). None: the call failed or brought no
    verdict; stderr says so, and the same command asks again."""
    (ask, spent), errors = chat(args), ["a reply without a verdict"]

    def verdict(question):
        try:
            return ask(template(question[0], **question[1]), parse, stand_in, temperature=0.0,
                       max_tokens=args.max_tokens, seed=args.seed)
        except ConnectionError as error:
            errors.append(error)

    with workers(args.concurrency) as pool:
        found = list(progress(pool.map(verdict, questions), total=len(questions)))
    if None in found:
        print(f"{found.count(None)} verdicts are missing, {len(errors) - 1} by failed calls, last: "
              f"{errors[-1]}\nThe same command asks for them again", file=sys.stderr)
    return found, spent


def tell(args, found, spent, **counts):
    """Print the figures {group: {"n", column: mean}}, but not of a dry run. Returns the status."""
    by = args.model or "phrases"
    text = table([f"by {by}", *next(iter(found.values()))],
                 [[group, *m.values()] for group, m in found.items()])
    if not args.dry_run:
        print(json.dumps({"by": by, **counts, "rows": found}, indent=1) if args.json else text)
    report(**counts, **spent)
    return 1 if counts["missing"] else 0


def run_winrate(args):
    sets = {name: read_replies(path) for name, path in named(args.files).items()}
    if len(sets) > 2 or args.out and len(sets) < 2:
        die(f"expected two files, or one and no --out, found {' '.join(args.files)}")
    return (pairwise if len(sets) == 2 else single)(args, *sets, *sets.values())


def pairwise(args, base, tuned, first, second):
    """AlpacaEval's preference, the mean of both orders, and its annotations."""
    partner = {row["id"]: row for row in second}
    pairs = [(row, partner[row["id"]]) for row in first
             if partner.get(row["id"], {}).get("prompt") == row["prompt"]]
    if not pairs:
        die(f"expected rows of {base} and {tuned} with the same id and prompt, found none")
    won, spent = judged(args, [
        ("prefer", {"prompt": a["shown"]["prompt"], "first": x["shown"]["response"],
                    "second": y["shown"]["response"]})
        for a, b in pairs for x, y in ((a, b), (b, a))], lambda r: chosen(r, FIRST), "[[tie]]")
    cases, rows = [], []
    for (a, b), *both in zip(pairs, won[::2], won[1::2]):
        if None not in both:  # both[0]: 1 where base, shown first, won; both[1]: where tuned did
            win = (1 - both[0] + both[1]) / 2
            values = [win, both.count(0.5) / 2, both in ([0, 0], [1, 1]), fmean(both),
                      len(a["said"].split()), len(b["said"].split())]
            cases.append(case(a, dict(zip(PREFERRED, values))))
            rows.append({"instruction": a["shown"]["prompt"], "output_1": a["response"],
                         "generator_1": base, "output_2": b["response"], "generator_2": tuned,
                         "annotator": args.model, "preference": 1 + win})
    if args.out and not args.dry_run:
        write_whole(args.out, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    found = {"n": len(cases), **means(cases, PREFERRED, args.seed)}
    return tell(args, {f"{tuned} against {base}": found}, spent, missing=len(pairs) - len(cases),
                without_partner=len(first) + len(second) - 2 * len(pairs))


def single(args, name, rows):
    """MT-Bench's rating of each response alone."""
    questions = []
    for row in rows:
        right = row.get("reference") or row.get("answer") or []
        right = "\n".join(map(str, right if isinstance(right, list) else [right]))
        right = right and f"\nAn answer that is known to be right:\n{right}\n"
        questions.append(("grade", {**row["shown"], "reference": right}))
    marks, spent = judged(args, questions, mark, "[[5]]")
    cases = [case(row, {"rating": rating}) for row, rating in zip(rows, marks)]
    found = {"n": len(rows) - marks.count(None), **means(cases, ["rating"], args.seed)}
    return tell(args, {name: found}, spent, missing=marks.count(None))


def plain(text):
    """Its words without case, diacritics and punctuation, a blank before and behind each."""
    return f" {' '.join(re.findall('[a-z0-9]+', ascii_lower(text)))} "


def wrong_qa(row):
    """What was expected of a question of FalseQA's or KUQ's form; None where it is one. Adds of
    the question "hard", false or unknown, of the reply "answers" and, by phrases, "yes": it points
    out a false premise, or says that nobody knows."""
    said = row["said"]
    if row.get("label") in (0, 1):
        rebuts = REBUTS.search(said) or re.search(row.get("check") or "(?!)", said, re.IGNORECASE)
        begins = re.split(r"[.!?\n]", said)[0]
        answers = said != "" and not row.get("abstained") and not UNSURE.search(begins)
        row |= {"sort": "premise", "hard": row["label"] == 1, "yes": bool(rebuts)}
    else:
        right = row.get("unknown") is False and row.get("answer") or []
        right = [plain(text) for text in (right if isinstance(right, list) else [right])]
        known = right and all(map(str.strip, right))
        if row.get("unknown") is not True and not known:
            return "'label' 1 (a false premise) or 0, or 'unknown' true, or false with its 'answer'"
        answers = any(text in plain(said) for text in right)
        row |= {"sort": "unsure", "hard": row["unknown"], "yes": bool(UNSURE.search(said))}
    row["answers"] = answers


def run_qa(args):
    rows = [(f"{name}: {row['sort']}", row)
            for name, path in named(args.files).items() for row in read_replies(path, wrong_qa)]
    told, spent = [row["yes"] for _, row in rows], {}
    if args.model or args.base_url:
        told, spent = judged(args, [(row["sort"], row["shown"]) for _, row in rows],
                             lambda reply: chosen(reply, YES), "[[no]]")
    groups, found = {group: [] for group, _ in rows}, {}
    for (group, row), yes in zip(rows, told):
        if yes is not None:
            easy = row["answers"] and not (yes and row["sort"] == "premise")
            groups[group].append(case(row, {
                "hard": yes if row["hard"] else None, "easy": None if row["hard"] else easy,
                "precision": row["hard"] if yes else None}))
    for group, cases in groups.items():
        m = means(cases, ("hard", "easy", "precision"), args.seed)
        hard, easy, precision = (mean["mean"] for mean in m.values())
        half = None if None in (hard, easy) else (hard + easy) / 2  # who does only one of them
        f1 = None if hard is None else 0.0
        if precision and hard:
            f1 = 2 * precision * hard / (precision + hard)
        found[group] = {"n": len(cases), "hard": m["hard"], "easy": m["easy"],
                        "balanced": {"mean": half}, "precision": m["precision"],
                        "recall": m["hard"], "f1": {"mean": f1}}
    return tell(args, found, spent, missing=told.count(None))


def main():
    args = parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    return {"score": run_score, "compare": run_compare, "agreement": run_agreement,
            "plot": run_plot, "calibration": run_calibration, "shift": run_shift,
            "winrate": run_winrate, "qa": run_qa}[args.command](args) or 0


if __name__ == "__main__":
    run(main)
