"""
Stage 3. Judge every fact against a reference work, and keep the evidence beside the verdict.

Reads   facts.jsonl      from 02; or FActScore's labelled files turned into our rows
Writes  verified.jsonl   the same rows, each fact judged:
  {"text": "Bolivia borders Peru", "label": "S", "kind": "border",
   "evidence": [{"title": "Bolivia", "field": "Land boundaries", "text": "total: 7,252 km; border ..."}]}
  label   S supported, NS not supported (contradicted or simply not stated), IR nothing to check,
          null could not be judged (its topic has no page): counted, left out of every score, exit 1
  kind    border, direction, number, region, place, capital, membership, vague, other
Corpus  JSONL rows {"title", "text", "field"?}, one passage a row

The topic's page comes first: its title exactly, then without case and diacritics, then without articles and
by the names in data/lexicon.json ("aliases"). --method lexical (rules.py) scans the whole page: all names,
numbers and directions of a part must stand in one passage whose field fits the claim's relation. For a
fact that is not supported, BM25 picks the passages to show; it never decides.

Not as in the papers: FActScore, FLAME and FactAlign ask a language model for the verdict. This check is
deterministic, and stingy: it finds fewer of the true claims than a person does (README, Verifier).

CPU, 5 seconds:  python 03_verify.py --in runs/dev/facts.jsonl --out runs/dev/verified.jsonl
"""
import json
import re
from collections import Counter
from pathlib import Path

import rules
from common import arguments, die, output, progress, read_jsonl, report, run, write_whole

WORLD = "data/world/countries.jsonl"


def parse_args():
    p = arguments(__doc__)
    p.add_argument("--method", default="lexical", choices=["lexical"], help="who judges")
    p.add_argument("--corpus", default=WORLD, metavar="FILE", help="the reference work (python data/prepare.py)")
    p.add_argument("--top", type=int, default=2, help="passages kept as evidence")
    p.add_argument("--open-search", action="store_true",
                   help="a topic without a page is searched in the whole corpus instead of left unjudged")
    p.add_argument("--retry-null", action="store_true", help="judge the facts that came out null again")
    return p.parse_args()


# ---------------------------------------------------------------------------------------------
# The topic's page

def plain_title(title):
    """The tolerant form of a title: no case, no diacritics, no article, no punctuation."""
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"^the ", "", rules.ascii_lower(title))).strip()


def index_titles(passages):
    """{title: its passages} and the looser names by which a page is found."""
    pages = {}
    for passage in passages:
        pages.setdefault(passage["title"], []).append(passage)
    loose = {}
    for title in pages:
        loose.setdefault(title.lower(), title)
        loose.setdefault(plain_title(title), title)
    for alias, title in rules.LEXICON["aliases"].items():
        if title in pages:
            loose.setdefault(plain_title(alias), title)
    return pages, loose


def find_page(topic, pages, loose):
    """The title of the topic's page: exact, then case and diacritics, then articles and aliases; or None."""
    if topic in pages:
        return topic
    return loose.get(topic.lower()) or loose.get(plain_title(topic))


def rank_passages(query, passages, top):
    """The `top` passages nearest to the query by BM25Plus (BM25Okapi ties on small pages), best first."""
    from rank_bm25 import BM25Plus
    if not passages:
        return []
    texts = [rules.words(f"{p.get('field', '')} {p['text']}") or [""] for p in passages]
    scores = BM25Plus(texts).get_scores(rules.words(query))
    order = sorted(range(len(passages)), key=lambda i: (-scores[i], i))
    return [passages[i] for i in order[:top]]


# ---------------------------------------------------------------------------------------------

def judge(claim, page, passages, top):
    """{"label", "kind", "evidence"} of one claim against its topic's page (rules.read_page)."""
    label, carriers = rules.check(claim, page)
    shown = carriers[:top] or rank_passages(claim, passages, top)
    return {"label": label, "kind": rules.kind_of(claim, page["topic"]), "evidence": shown}


def verify(row, pages, loose, read, judged, top, open_search):
    """A row of facts with every fact judged. `read` and `judged` remember pages and verdicts: identical
    claims on one topic are judged once."""
    topic = row["topic"]
    title = find_page(topic, pages, loose)
    sentences = []
    for sentence in row["sentences"]:
        facts = []
        for fact in sentence["facts"]:
            key = (topic, fact["text"])
            if key not in judged:
                passages = pages.get(title)
                if passages is None and open_search:
                    everything = [p for page in pages.values() for p in page]
                    passages = rank_passages(fact["text"], everything, 20)
                if passages is None:
                    judged[key] = {"label": None, "kind": rules.kind_of(fact["text"], topic), "evidence": []}
                else:
                    if title is None or topic not in read:
                        read[topic] = rules.read_page(passages, topic, set(pages))
                    judged[key] = judge(fact["text"], read[topic], passages, top)
            facts.append({**fact, **judged[key]})
        sentences.append({**sentence, "facts": facts})
    return {**row, "sentences": sentences}


def labels_of(row):
    return [fact["label"] for sentence in row["sentences"] for fact in sentence["facts"]]


def forget_nulls(out):
    """--retry-null: take the rows with a null fact out of OUT, so that this run judges them again."""
    lines = Path(out).read_text(encoding="utf-8").splitlines(keepends=True) if Path(out).exists() else []
    keep = [line for line in lines if not line.endswith("\n") or None not in labels_of(json.loads(line))]
    if len(keep) < len(lines):
        write_whole(out, "".join(keep))


def main():
    args = parse_args()
    rows = read_jsonl(args.inp, {"sentences": list, "topic": str}, made_by="02_decompose.py")
    corpus = read_jsonl(args.corpus, {"title": str, "text": str}, made_by="data/prepare.py", unique=False)
    if args.top < 1:
        die("--top must be at least 1")
    for row in corpus:
        row.pop("id")
    pages, loose = index_titles(corpus)
    counts, kinds, no_page = Counter(), Counter(), set()
    read, judged = {}, {}
    if args.retry_null:
        forget_nulls(args.out)
    with output(args, rows) as (done, write, _):
        todo = rows[:args.limit]
        for row in progress(todo, unit="row"):
            if row["id"] not in done:
                done[row["id"]] = verify(row, pages, loose, read, judged, args.top, args.open_search)
                write(done[row["id"]])
            found = done[row["id"]]
            counts.update(labels_of(found))
            kinds.update(f["kind"] for s in found["sentences"] for f in s["facts"])
            if None in labels_of(found):
                no_page.add(row["topic"])
    if no_page:
        print(f"no page for: {', '.join(sorted(no_page))}")
    total = counts["S"] + counts["NS"]
    report(rows_in=len(todo), rows_out=len(todo), facts=sum(counts.values()), supported=counts["S"],
           not_supported=counts["NS"], irrelevant=counts["IR"], unjudged=counts[None],
           pooled_precision=round(counts["S"] / total, 4) if total else None,
           kinds=", ".join(f"{k} {n}" for k, n in kinds.most_common()))
    return 1 if counts[None] else 0


if __name__ == "__main__":
    run(main)
