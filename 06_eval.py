"""
Stage 6. Score verified responses, compare models, hold a verifier against human labels.

Reads   verified.jsonl   03's rows {"id", "prompt_id", "topic", "response", "finish", "abstained",
                         "sentences": [{"facts": [{"text", "label", "kind", "human"?}]}]}, labels
                         S, NS, IR or null; FActScore's human-labelled files go in as they are
Writes  stdout (compare also --out-md, --out-json); `score --json` is one object:
  {"n_prompts": 104, "n_responses": 416, "n_topics": 26, "k": 5, "label": "label",
   "metrics": {"f1_at_k": {"mean": 0.12, "lo": 0.10, "hi": 0.15}, ...},
   "by_kind": {"border": {"share": {"mean": 0.24, ...}, "precision": {"mean": 0.31, ...}}, ...}}

Every metric is a mean over a prompt's responses, then over prompts; pooled figures are called so.
Intervals are 95 % percentile bootstraps over topics: a topic's prompts are drawn together.
  * Repeated facts of a response (equal content words, the topic's own removed) count once, the
    first of them. Facts that carry only a `human` label are left as they are.
  * No fact labelled S or NS: F1@K 0, no precision. No label at all, and abstained or empty: not
    responded. "facts" is a mean over those that responded (FActScore's way), supported and
    unsupported facts are means over all, so that silence lowers them.
  * More than 20 % of its facts null: unjudged, out of every figure made of labels.

Not as in the papers: SAFE and FactAlign count repeated facts again and fix K (64, 100); here K is
the median of S+NS of the base's development responses, frozen in data/protocol.json.

  python 06_eval.py score --in runs/demo/base.jsonl
  python 06_eval.py compare base=runs/x/base.jsonl base-cool=runs/x/cool.jsonl tuned=runs/x/1.jsonl
  python 06_eval.py agreement --in runs/label/verified.jsonl --by half,kind
"""
import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, median

from common import die, read_jsonl, report, run, write_whole
from rules import fact_key

PROTOCOL = json.loads(Path(__file__).parent.joinpath("data", "protocol.json").read_text("utf-8"))
LABELS = ("S", "NS", "IR", None)
BASES = ("base", "base-cool", "base-greedy")
NAMES = (*BASES, "tuned", "tuned-cool", "tuned-greedy")
# Kinds of fact that are easy to farm: F1@K and precision are repeated without each of these groups
WITHOUT = {"border_direction": ("border", "direction"), "region": ("region",), "vague": ("vague",)}
PLAIN = ("supported", "unsupported", "facts", "words", "ratio")  # the others are shown in per cent
TABLE = ("f1_at_k", "precision", *PLAIN[:4], "responded", "repeated", "cut_by_length")
PAIRED = ("base", "tuned", "difference", "ratio", "headroom")
VERDICT = ("f1_at_k", "precision",
           "f1_at_k_without_border_direction", "precision_without_border_direction")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    p.set_defaults(suggest_k=False)
    score = commands.add_parser("score", help="all metrics of one file")
    score.add_argument("--suggest-k", action="store_true", help="only print this base file's K")
    compare = commands.add_parser("compare", help="base and tuned in one table, and the verdict")
    compare.add_argument("files", nargs="+", metavar="NAME=FILE", help=f"NAME: {', '.join(NAMES)}")
    compare.add_argument("--out-md", metavar="FILE", help="write the tables there too")
    compare.add_argument("--out-json", metavar="FILE", help="write the numbers there")
    agreement = commands.add_parser("agreement", help="a verifier's labels against human ones")
    agreement.add_argument("--by", default="", metavar="FIELD,...", help="of a fact or its row")
    for command in (score, agreement):
        command.add_argument("--in", dest="inp", required=True, metavar="FILE", help="03's rows")
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    for command in (score, compare):
        command.add_argument("--k", type=int, default=PROTOCOL["k"],
                             help="K of F1@K (default: data/protocol.json's)")
        command.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    args = p.parse_args()
    if args.command != "agreement" and not args.suggest_k and (args.k or 0) < 1:
        die(f"expected a K of at least 1, found {args.k}: give --k N, or write into "
            "data/protocol.json what `score --suggest-k` prints for the base's dev responses")
    return args


# ---------------------------------------------------------------------------------------------
# Reading

def facts_of(row):
    """Facts of 03's row, or of FActScore's own: its labels are human, no annotations: abstained."""
    if "annotations" in row and "sentences" not in row:
        row["abstained"] = row["annotations"] is None
        return [{"text": fact["text"], "human": fact["label"]}
                for sentence in row["annotations"] or []
                for fact in sentence["human-atomic-facts"] or []]
    return [fact for sentence in row["sentences"] for fact in sentence["facts"]]


def read_facts(path):
    """[(row, its facts)], each fact checked."""
    rows, read = read_jsonl(path, {"response": str}, made_by="03_verify.py"), []
    lines = Path(path).read_bytes().splitlines()
    for n, row in zip([n for n, line in enumerate(lines, 1) if line.strip()], rows):
        try:
            facts = facts_of(row)
            wrong = [fact for fact in facts if not isinstance(fact["text"], str)
                     or not isinstance(fact.get("kind", ""), str)
                     or fact.get("label") not in LABELS or fact.get("human") not in LABELS]
        except (KeyError, TypeError, AttributeError) as error:
            wrong = [f"{type(error).__name__} {error}"]
        if wrong:
            die(f"{path}:{n}: expected 'sentences' of 'facts' with text and label S, NS, IR or "
                f"null (03_verify.py writes them), found {wrong[0]!r:.80}")
        read.append((row, facts))
    return read


def read_responses(path, k):
    """(responses {"prompt", "topic", "values"}, the label that scores them: "label" or "human")."""
    read, responses = read_facts(path), []
    fields = {field for _, facts in read for fact in facts for field in fact}
    field = "human" if "human" in fields and "label" not in fields else "label"
    kinds = sorted({fact["kind"] for _, facts in read for fact in facts if "kind" in fact})
    for row, said in read:
        if not all(field in fact for fact in said):
            die(f"{path}: expected {field!r} in every fact (03_verify.py), not so in {row['id']!r}")
        facts, n_said = [(fact[field], fact.get("kind")) for fact in said], 0
        if field == "label":
            n_said = len(said)
            keys = [fact_key(fact["text"], str(row.get("topic") or "")) for fact in said]
            facts = [fact for i, fact in enumerate(facts) if keys[i] not in keys[:i]]
        prompt = str(row.get("prompt_id") or row["id"])
        responses.append({"prompt": prompt, "topic": str(row.get("topic") or prompt),
                          "values": measure(row, facts, n_said, k, kinds)})
    return responses, field


# ---------------------------------------------------------------------------------------------
# One response. Its facts are pairs (label, kind)

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
    """What labels say of a list of facts; None where nothing, all None where > 20 % are null."""
    s, ns, ir, null = (sum(label == wanted for label, _ in facts) for wanted in LABELS)
    n = s + ns + ir
    found = {"f1_at_k": f1_at_k(s, ns, k), "precision": ratio(s, s + ns), "factscore": ratio(s, n),
             "factscore_penalised": ratio(s * length_penalty(n), n), "irrelevant": ratio(ir, n),
             "supported": s, "unsupported": ns}
    return dict.fromkeys(found) if 5 * null > len(facts) else found


def measure(row, facts, n_said, k, kinds=()):
    """{metric: value} of one response, None where it has none.

    n_said counts repeated facts as well (0: not looked for). Keys (kind, "share") and
    (kind, "precision") are by kind, for all kinds of the file.
    """
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
    # 02 passes over a reasoning block, too
    text = re.sub(r"^\s*<think>.*?(</think>|$)", "", row["response"], flags=re.DOTALL)
    labelled = any(label for label, _ in facts)
    responded = labelled or not (row.get("abstained") or not text.strip())
    cut = row["finish"] == "length" if "finish" in row else None
    return values | {"facts": len(facts) if responded else None, "words": len(text.split()),
                     "responded": responded, "repeated": ratio(n_said - len(facts), n_said),
                     "unjudged": unjudged, "cut_by_length": cut}


# ---------------------------------------------------------------------------------------------
# Means and intervals: every figure is a ratio of two sums over topics

def estimate(topic_of, num, den=None, seed=0, resamples=2000):
    """sum(num) / sum(den), each {prompt: number}, and its interval; without den the mean of num.

    No interval with one topic only, or where a resample has nothing to divide by.
    """
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


def summarise(responses, field, k, seed=0):
    """The object that `score --json` prints."""
    topic_of, metrics, by_kind = {r["prompt"]: r["topic"] for r in responses}, {}, {}
    unjudged = sum(r["values"]["unjudged"] for r in responses)
    for name in responses[0]["values"]:
        found = estimate(topic_of, by_prompt(responses, name), seed=seed)
        if found["mean"] is None:
            found["reason"] = f"none in {len(responses)} responses, {unjudged} of them unjudged"
        if isinstance(name, tuple):
            by_kind.setdefault(name[0], {})[name[1]] = found
        else:
            metrics[name] = found
    s, ns = (by_prompt(responses, name, sum) for name in ("supported", "unsupported"))
    metrics["precision_pooled"] = estimate(topic_of, s, {p: s[p] + ns[p] for p in s}, seed)
    return {"n_prompts": len(topic_of), "n_responses": len(responses),
            "n_topics": len(set(topic_of.values())), "k": k, "label": field,
            "metrics": metrics, "by_kind": by_kind}


def paired(tuned, base, name, seed=0, resamples=2000):
    """Tuned against base in one column, on the prompts where both have a value.

    difference tuned - base; ratio tuned / base; headroom taken (tuned - base) / (best - base), best
    the mean over prompts of the best of the base's responses in this column.
    """
    topic_of = {r["prompt"]: r["topic"] for r in base}
    t, b, best = by_prompt(tuned, name), by_prompt(base, name), by_prompt(base, name, max)
    both = [prompt for prompt in b if prompt in t]
    of_base, of_tuned = ({p: side[p] for p in both} for side in (b, t))
    gain, room = ({p: side[p] - b[p] for p in both} for side in (t, best))
    parts = {"base": (of_base, None), "tuned": (of_tuned, None), "difference": (gain, None),
             "ratio": (of_tuned, of_base), "headroom": (gain, room)}
    return {"prompts": len(both), **{part: estimate(topic_of, num, den, seed, resamples)
                                     for part, (num, den) in parts.items()}}


def agree(pairs):
    """[(label, human)] -> agreement on S against not-S; null labels are counted apart."""
    cells = Counter((label == "S", human == "S") for label, human in pairs if label is not None)
    tp, fp, fn, tn = (cells[a, b] for a, b in ((1, 1), (1, 0), (0, 1), (0, 0)))
    n, recall, specificity = tp + fp + fn + tn, ratio(tp, tp + fn), ratio(tn, tn + fp)
    chance = (tp + fp) * (tp + fn) + (tn + fn) * (tn + fp)  # n^2 times agreement by chance
    return {"facts": n, "null": len(pairs) - n, "accuracy": ratio(tp + tn, n),
            "kappa": ratio(n * (tp + tn) - chance, n * n - chance), "always_ns": ratio(tn + fp, n),
            "recall": recall, "precision": ratio(tp, tp + fp),
            "balanced": None if None in (recall, specificity) else (recall + specificity) / 2,
            "tp": tp, "fp": fp, "fn": fn, "tn": tn}


# ---------------------------------------------------------------------------------------------
# The commands

def cell(found, name=""):
    """A mean and its interval, as tables show them."""
    if not found or found["mean"] is None:
        return "-"
    scale, digits, unit = (1, 2, "") if name in PLAIN else (100, 1, " %")
    mean, *ends = (f"{found[part] * scale:.{digits}f}" for part in ("mean", "lo", "hi")
                   if found[part] is not None)
    return mean + unit + (f" [{', '.join(ends)}]" if ends else "")


def table(header, body):
    """A markdown table whose source is aligned."""
    widths = [max(map(len, items)) for items in zip(header, *body)]
    lines = [header, ["-" * width for width in widths], *body]
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines) + "\n"


def run_score(args):
    k = 1 if args.suggest_k else args.k
    responses, field = read_responses(args.inp, k)
    found = summarise(responses, field, k, args.seed)
    if args.suggest_k:
        claims = [r["values"]["supported"] + r["values"]["unsupported"] for r in responses
                  if not r["values"]["unjudged"]] or die(f"{args.inp}: every response is unjudged")
        k = max(1, math.ceil(median(claims)))
        print(f"K {k}, 2K {2 * k}: median S+NS of {len(claims)} responses is {median(claims):g}")
    elif args.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{args.inp}: K = {k}, scored by {field!r} of its facts\n")
        print(table(["metric", "mean [95 % interval]"], [
            [name, m.get("reason", cell(m, name))] for name, m in found["metrics"].items()]))
        print(table(["kind", "share", "precision"], [
            [kind, cell(m["share"]), cell(m["precision"])]
            for kind, m in found["by_kind"].items()]))
    report(responses=len(responses), prompts=found["n_prompts"], topics=found["n_topics"], k=k,
           label=field, unjudged=sum(r["values"]["unjudged"] for r in responses))


def best_of(responses):
    """Of each prompt the response with the highest F1@K, the first of equals."""
    best, f1 = {}, [r["values"]["f1_at_k"] for r in responses]
    for i in sorted(range(len(responses)), key=lambda i: 1 if f1[i] is None else -f1[i]):
        best.setdefault(responses[i]["prompt"], responses[i])
    return list(best.values())


def verdicts(sets, rows, seed):
    """Tuned against base sampled and against the better of base's decodings, column by column."""
    found = []
    for name in (name for name in VERDICT if rows["base"]["metrics"][name]["mean"] is not None):
        better = max((base for base in BASES if base in sets),
                     key=lambda base: rows[base]["metrics"][name]["mean"] or 0)
        for against in dict.fromkeys(("base", better)):
            row = paired(sets["tuned"], sets[against], name, seed)
            low = row["difference"]["lo"]
            if against != "base":
                row["headroom"] = None  # it is defined over the base's samples
            found.append({"column": name, "against": against, "is_better": against == better, **row,
                          "beats": None if low is None else low > 0})
    return found


def tables(rows, found):
    """Markdown of compare: rows {label: summary}, found the verdicts."""
    body, of_base = [], rows["base"]["metrics"]["supported"]["mean"]
    for label, row in rows.items():
        line = [cell(row["metrics"][name], name) for name in TABLE]
        line[1] += " †" * ((row["metrics"]["supported"]["mean"] or 0) < (of_base or 0))
        line[4:] = [text.split(" [")[0] for text in line[4:]]  # intervals for the main columns only
        body.append([label, str(row["n_prompts"]), *line])
    text = table(["", "prompts", *TABLE], body) + "† fewer supported facts than base\n\n"
    if not found:
        return text
    text += table(["tuned against", "prompts", *PAIRED], [
        [f"{row['against']}, {row['column']}", str(row["prompts"]),
         *(cell(row[part], part) for part in PAIRED)] for row in found])
    says = {True: "beats", False: "does not beat", None: "cannot be told from"}
    for row in found:
        if row["is_better"]:
            text += (f"- {row['column']}: tuned {says[row['beats']]} {row['against']}, "
                     "the better of the base's decodings given\n")
    if not set(BASES) <= set(rows):
        text += "- base-cool or base-greedy is missing: mere sharpening is not ruled out\n"
    return text


def run_compare(args):
    k, pairs = args.k, [text.partition("=")[::2] for text in args.files]
    files = dict(pairs)
    if len(files) < len(pairs) or not {"base"} <= set(files) <= set(NAMES) or "" in files.values():
        die(f"expected NAME=FILE, each NAME once, base among them, all of {', '.join(NAMES)}; "
            f"found {' '.join(args.files)}")
    read = {name: read_responses(files[name], k) for name in NAMES if name in files}
    base, field = read["base"]
    n = max(Counter(r["prompt"] for r in base).values())
    read[f"base best-of-{n}"] = best_of(base), field
    rows = {name: summarise(*read[name], k, args.seed)
            for name in sorted(read, key=lambda name: name.startswith("tuned"))}
    sets = {name: responses for name, (responses, _) in read.items()}
    prompts = {name: {r["prompt"] for r in responses} for name, responses in sets.items()}
    for name in sets:
        if not prompts[name] & prompts["base"]:
            die(f"{files[name]}: expected prompts of {files['base']}, found none of them")
    found = verdicts(sets, rows, args.seed) if "tuned" in sets else []
    labels = " and ".join(sorted({field for _, field in read.values()}))
    text = (f"K = {k}, scored by {labels!r} of the facts; mean [95 % interval over topics], "
            "differences in points\n\n" + tables(rows, found))
    print(text, end="")
    if args.out_md:
        write_whole(args.out_md, text)
    if args.out_json:
        whole = {"k": k, "rows": rows, "verdict": found}
        write_whole(args.out_json, json.dumps(whole, indent=1) + "\n")
    report(files=len(files), prompts=rows["base"]["n_prompts"], k=k)


def run_agreement(args):
    both = [{**row, **fact} for row, facts in read_facts(args.inp) for fact in facts
            if "label" in fact and fact.get("human")]
    fields = [field for field in args.by.split(",") if field]
    for field in ("human", *fields):
        if not any(field in fact for fact in both):
            die(f"{args.inp}: expected facts with 'label' (03_verify.py), 'human' and {field!r}, "
                "found none")
    groups = {"all": both}
    for field in fields:
        for fact in both:
            groups.setdefault(f"{field} {fact.get(field)}", []).append(fact)
    found = {name: agree([(fact["label"], fact["human"]) for fact in group])
             for name, group in groups.items()}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("S against not-S; tp: both say S, fp: only the verifier, fn: only the human\n")
        print(table(["", *found["all"]], [[name, *(
            "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
            for value in row.values())] for name, row in found.items()]))
    report(facts=len(both), groups=len(found))


def main():
    args = parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    {"score": run_score, "compare": run_compare, "agreement": run_agreement}[args.command](args)
    return 0


if __name__ == "__main__":
    run(main)
