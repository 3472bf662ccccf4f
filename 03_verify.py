"""
Stage 3. Judge every fact against a reference work, and keep the evidence beside the verdict.

Reads   facts.jsonl      02's rows: {"id", "topic", "sentences": [{"text", "facts": [{"text"}]}]}
Writes  verified.jsonl   the same rows, each fact judged:
  {"text": "Bolivia borders Peru", "label": "S", "kind": "border",
   "evidence": [{"title": "Bolivia", "field": "Land boundaries", "text": "total: 7,252 km; ..."}]}
  label   S supported, NS not supported (contradicted or simply not stated), IR nothing to check,
          null could not be judged (its topic has no page): counted, left out of every score, exit 1
  kind    border, direction, number, region, place, capital, membership, vague, other
Corpus  JSONL rows {"title", "text", "field"?}, one passage a row

The topic's page comes first: its title exactly, then without case, diacritics and articles, then by
the other names in data/lexicon.json ("aliases"). --method lexical (rules.py) scans the whole page:
all names, numbers and directions of a part must stand in one passage, and that passage's field must
fit the claim's relation. For a fact that is not supported, BM25 picks the passages to show; it
decides nothing.

Not as in the papers: FActScore, FLAME and FactAlign ask a language model for the verdict. This is
deterministic, and stingy: it misses true claims that a person finds (README, the verifier).

CPU, 5 seconds:  python 03_verify.py --in runs/dev/facts.jsonl --out runs/dev/verified.jsonl
"""
import hashlib
import re
from collections import Counter
from pathlib import Path

import rules
from common import arguments, die, output, progress, read_jsonl, report, run


def parse_args():
    p = arguments(__doc__)
    p.add_argument("--method", default="lexical", choices=["lexical"], help="who judges")
    p.add_argument("--corpus", default="data/world/countries.jsonl", metavar="FILE",
                   help="the reference work (python data/prepare.py makes the default)")
    p.add_argument("--top", type=int, default=2, help="passages kept as evidence of a fact")
    p.add_argument("--open-search", action="store_true",
                   help="search the whole corpus for a topic without a page, instead of null")
    p.add_argument("--retry-null", action="store_true", help="judge facts that came out null again")
    args = p.parse_args()
    if args.top < 1:
        die("--top must be at least 1")
    return args


# ---------------------------------------------------------------------------------------------
# Evidence: the topic's page

def plain_title(title):
    """The tolerant form of a title: no case, no diacritics, no article, no punctuation."""
    plain = rules.ascii_lower(title)
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"^the ", "", plain)).strip()


def index_titles(passages):
    """({title: its passages}, {tolerant form or alias: title})."""
    pages = {}
    for passage in passages:
        pages.setdefault(passage["title"], []).append(passage)
    aliases = {a: t for a, t in rules.LEXICON["aliases"].items() if t in pages}
    loose = {plain_title(name): title for name, title in [*aliases.items(), *zip(pages, pages)]}
    loose.pop("", None)  # names without a Latin letter or digit
    return pages, loose


def find_page(topic, pages, loose):
    """The title of the topic's page, or None."""
    return topic if topic in pages else loose.get(plain_title(topic))


def bm25_index(passages):
    """BM25Plus over passages; BM25Okapi would tie on a page of two (its idf is 0 there)."""
    from rank_bm25 import BM25Plus
    return BM25Plus([rules.words(f"{p.get('field', '')} {p['text']}") or [""] for p in passages])


def rank_passages(query, passages, index, top):
    """The `top` passages nearest to the query, best first; ties keep the order of the page."""
    scores = index.get_scores(rules.words(query))
    order = sorted(range(len(passages)), key=lambda i: (-scores[i], i))
    return [passages[i] for i in order[:top]]


# ---------------------------------------------------------------------------------------------
# Verdicts

def kind_of(claim, topic):
    """border, direction, capital, membership, number, region, place, vague or other: one each."""
    c = rules.parse(claim, topic)
    low = c["text"].lower()
    if re.search(rules.BORDER, low):
        return "direction" if c["sides"] else "border"
    for kind, pattern in rules.LEXICON["kinds"]:
        if re.search(pattern, low):
            return kind
    if any(before not in rules.LEXICON["most"] for _, _, before in c["numbers"]):
        return "number"
    if re.search(rf"\b{rules.DIRECTION} of\b|\bto the {rules.DIRECTION}\b", low):
        return "direction"
    if re.search(rules.LEXICON["continents"], low):
        return "region"
    if c["names"] and re.search(r"\b(?:located|situated|nestled|lies|in|off|on|between)\b", low):
        return "place"
    vague = [w for w in c["content"] if w in rules.VAGUE]
    return "vague" if not c["names"] and len(vague) * 2 >= len(c["content"]) else "other"


def open_page(topic, claim, corpus, open_search):
    """What a claim about a topic is judged by: {"page", "passages", "index"}, or None.

    corpus  {"pages", "loose", "all": BM25 over everything, when needed, "open": pages by topic}
    """
    title = find_page(topic, corpus["pages"], corpus["loose"])
    if title is None and not open_search:
        return None
    key = topic if title else (topic, claim)
    if key not in corpus["open"]:
        passages = corpus["pages"].get(title)
        if passages is None:
            every = [p for page in corpus["pages"].values() for p in page]
            corpus["all"] = corpus["all"] or bm25_index(every)
            passages = rank_passages(claim, every, corpus["all"], 20)
        corpus["open"][key] = {"page": rules.read_page(passages, topic, set(corpus["pages"])),
                               "passages": passages, "index": bm25_index(passages)}
    return corpus["open"][key]


def judge(claim, topic, corpus, top, open_search):
    """{"label", "kind", "evidence"} of one claim."""
    kind = kind_of(claim, topic)
    found = open_page(topic, claim, corpus, open_search)
    if found is None:
        return {"label": None, "kind": kind, "evidence": []}
    label, carriers = rules.check(claim, found["page"])
    shown = carriers or rank_passages(claim, found["passages"], found["index"], top)
    return {"label": label, "kind": kind, "evidence": shown[:top]}


def verify(row, judge_once):
    """A row of facts with every fact judged; judge_once(claim, topic) gives a fact's new fields."""
    return {**row, "sentences": [
        {**s, "facts": [{**f, **judge_once(f["text"], row["topic"])} for f in s["facts"]]}
        for s in row["sentences"]]}


def facts_of(row):
    return [fact for sentence in row["sentences"] for fact in sentence["facts"]]


def has_null(row):
    return any(fact["label"] is None for fact in facts_of(row))


# ---------------------------------------------------------------------------------------------

def wrong_parts(row):
    """What was expected of sentences without facts that have a text; None where they have them."""
    for sentence in row["sentences"]:
        facts = sentence.get("facts") if isinstance(sentence, dict) else None
        if not isinstance(facts, list) or not all(
                isinstance(fact, dict) and isinstance(fact.get("text"), str) for fact in facts):
            return "'sentences' as [{'facts': [{'text': ...}]}]"


def main():
    args = parse_args()
    rows = read_jsonl(args.inp, {"sentences": list, "topic": str}, made_by="02_decompose.py",
                      parts=wrong_parts)
    passages = read_jsonl(args.corpus, {"title": str, "text": str}, made_by="data/prepare.py",
                          unique=False)
    passages = [{k: p[k] for k in ("title", "field", "text") if k in p} for p in passages]
    args.corpus_sha256 = hashlib.sha256(Path(args.corpus).read_bytes()).hexdigest()
    pages, loose = index_titles(passages)
    corpus = {"pages": pages, "loose": loose, "all": None, "open": {}}
    counts, kinds, missing, judged = Counter(), Counter(), set(), {}

    def judge_once(claim, topic):
        if (topic, claim) not in judged:
            judged[topic, claim] = judge(claim, topic, corpus, args.top, args.open_search)
        return judged[topic, claim]

    again = has_null if args.retry_null else lambda row: False
    with output(args, rows, again) as (done, write, _):
        todo = rows[:args.limit]
        for row in progress(todo, unit="row"):
            if row["id"] not in done:
                done[row["id"]] = verify(row, judge_once)
                write(done[row["id"]])
            found = facts_of(done[row["id"]])
            counts.update(fact["label"] for fact in found)
            kinds.update(fact["kind"] for fact in found)
            missing |= {row["topic"]} if has_null(done[row["id"]]) else set()
    if missing:
        print(f"no page in {args.corpus} for: {', '.join(sorted(missing))}")
    checked = counts["S"] + counts["NS"]
    report(rows_in=len(todo), rows_out=len(todo), facts=sum(counts.values()), supported=counts["S"],
           not_supported=counts["NS"], irrelevant=counts["IR"], unjudged=counts[None],
           pooled_precision=round(counts["S"] / checked, 4) if checked else None,
           kinds=", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))
    return 1 if counts[None] else 0


if __name__ == "__main__":
    run(main)
