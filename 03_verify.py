"""
Stage 3. Judge every fact against a reference work, and keep the evidence beside the verdict.

Reads   facts.jsonl      02's rows: {"id", "topic", "sentences": [{"text", "facts": [{"text"}]}]}
Writes  verified.jsonl   the same rows, each fact judged:
  {"text": "Bolivia borders Peru", "label": "S", "kind": "border", "evidence": [{"title": "Bolivia",
   "field": "Land boundaries", "text": "total: 7,252 km; ...", "found": "title"}]}
  label   S supported, NS not supported (contradicted or simply not stated), IR nothing to check,
          null could not be judged (no page, an answer that is no verdict): counted, left out of
          every score, exit 1; --retry-null judges them again
  kind    border, direction, number, region, place, capital, membership, vague, other
  "repeats": true  says nothing that another fact of the response does not say; scores pass over it
  found   by the topic's page ("title"; "alias": without case, diacritics, articles, or another name
          in data/lexicon.json), or by "search" of all pages
Corpus  JSONL {"title", "text", "field"?}, a passage a row; or SQLite documents(title, text), as
        FActScore has it (data/corpus.py)

--method lexical     (rules.py) all names, numbers and directions of a part of the claim must stand
                     in one passage of the topic's page whose field fits. Deterministic
--method nli         a small fact checker reads the page in pieces: the best piece's P(supported)
                     becomes "score", S above 1/2 (FactCG; --model: its folder or hub name)
--method llm         a server (--model, --base-url) writes up to --steps search queries, each seeing
                     what was found, then gives the verdict. The queries search the topic's page
                     (FActScore), with --open-search the whole corpus (FactAlign, section 3.2)
--method confidence  FactTune-MC: --answers, 01's samples for 02's questions, are clustered: "conf":
                     {"max": largest share, "exp": sum p^2, "neg_ent": sum p log p}; no verdict
--method answers     APEFT: each answer of --answers is judged (--judge): "answers": [{"text",
                     "label", "count"}], "r": share of S, "known": unknown 0, potentially, known 1
--method rate        how well a response follows its prompt, 1 to 5: "rating", a server's mean of 3
                     (FLAME, section 4.3); without --model, 5 or 1 by the row's "check", a regex

Not as in the papers: FActScore, FLAME and FactAlign ask a language model for the verdict; the
lexical check is stingy: it misses true claims that a person finds (README, the verifier). FactAlign
searches with ColBERT, here BM25 does. What APEFT calls correct is not known; here a judge says it.

CPU, 5 seconds:  python 03_verify.py --in runs/dev/facts.jsonl --out runs/dev/verified.jsonl
A server:        python 03_verify.py --in runs/dev/facts.jsonl --out runs/dev/judged.jsonl \\
                     --method llm --base-url http://localhost:8000/v1 --model NAME --corpus wiki.db
"""
import math
import re
import sys
from collections import Counter

import rules
from common import (arguments, as_messages, chat, chat_arguments, die, digest, last_line,
                    load_model, output, progress, read_jsonl, report, run, template, workers)
from data import corpus

NLI = "derenlei/FactCG-DeBERTa-v3-Large"  # 0.4 B, MIT
NLI_INPUT = ("{document}\n\nChoose your answer: based on the paragraph above can we conclude that "
             '"{claim}"?\n\nOPTIONS:\n- Yes\n- No\nI think the answer is ')
NLI_WORDS = 550  # of a piece


def parse_args():
    p = arguments(__doc__)
    p.add_argument("--method", default="lexical", help="who judges, or what is measured",
                   choices=["lexical", "nli", "llm", "confidence", "answers", "rate"])
    p.add_argument("--judge", default="lexical", choices=["lexical", "nli", "llm"],
                   help="of --method answers")
    p.add_argument("--answers", metavar="FILE", help="01's samples for 02's --questions-out")
    p.add_argument("--check", metavar="REGEX", help="of --method rate: for rows without their own")
    # Evidence
    p.add_argument("--corpus", default="data/world/countries.jsonl", metavar="FILE",
                   help="the reference work (python data/prepare.py makes the default)")
    p.add_argument("--top", type=int, default=3, help="passages a query (FactAlign's 3), and shown")
    p.add_argument("--steps", type=int, default=2, help="queries a fact (FactAlign's 2); 0: "
                   "the claim itself, so one call a fact and no more (FActScore)")
    p.add_argument("--open-search", action="store_true", help="search the whole corpus: for topics "
                   "without a page, instead of null; by llm for all")
    p.add_argument("--retry-null", action="store_true", help="judge facts that came out null again")
    # The judge
    p.add_argument("--model", metavar="NAME", help="the server's name of it; of nli a folder or "
                   f"hub name (default {NLI})")
    p.add_argument("--device", help="of nli: cpu, cuda, ... (default: cuda if there is one)")
    p.add_argument("--max-tokens", type=int, default=1024, help="of a reply, reasoning included")
    p.add_argument("--concurrency", type=int, default=32, help="calls at a time")
    chat_arguments(p)
    args = p.parse_args()
    if min(args.top, args.steps + 1, args.max_tokens, args.concurrency) < 1:
        die("--top, --max-tokens and --concurrency must be at least 1, --steps 0")
    if (args.method in ("confidence", "answers")) != bool(args.answers):
        die("expected --answers with --method confidence and answers, and only there")
    judge = args.judge if args.method == "answers" else args.method
    if args.base_url and judge not in ("llm", "rate") or args.model and judge in (
            "lexical", "confidence"):
        die(f"expected --base-url and --model with another --method (--judge) than {judge}")
    if args.check and (args.method != "rate" or args.model):
        die("expected --check with --method rate and without --model, whose judge needs none")
    return args


# ---------------------------------------------------------------------------------------------
# Evidence: the topic's page, else a search

def indexed(passages):
    """{"passages", "index"}: BM25Plus, as BM25Okapi ties on a page of two (its idf is 0 there)."""
    from rank_bm25 import BM25Plus
    words = [rules.words(f"{p.get('field', '')} {p['text']}") or [""] for p in passages]
    return {"passages": passages, "index": BM25Plus(words or [[""]])}


def rank_passages(query, page, top):
    """The `top` passages nearest to the query, best first; ties keep the order of the page."""
    scores = page["index"].get_scores(rules.words(query))
    order = sorted(range(len(page["passages"])), key=lambda i: -scores[i])
    return [page["passages"][i] for i in order[:top]]


def line_of(passage):
    return ": ".join(passage[key] for key in ("field", "text") if passage.get(key))


def searched(c, query, top):
    return [{**passage, "found": "search"} for passage in corpus.search(c, query, top)]


def open_page(topic, claim, c, open_search):
    """{"passages", "index"} of the topic's page; else with open_search of what a search for the
    claim finds; else None."""
    title, how = corpus.find_page(c, topic)
    if title is None:
        return indexed(searched(c, claim, 20)) if open_search else None
    if topic not in c["open"]:
        c["open"][topic] = indexed([{**p, "found": how} for p in corpus.passages_of(c, title)])
    return c["open"][topic]


# ---------------------------------------------------------------------------------------------
# Verdicts: each judge makes {"label", "evidence", ...} of a claim, its topic and a page

def kind_of(claim, topic):
    """border, direction, capital, membership, number, region, place, vague or other: one each."""
    c = rules.parse(claim, topic)
    low = c["text"].lower()
    if re.search(rf"{rules.BORDER}|\bneighbou?r", low):
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


def lexical(claim, topic, page, c, args, _):
    if "facts" not in page:
        page["facts"] = rules.read_page(page["passages"], topic, c["titles"])
    label, carriers = rules.check(claim, page["facts"])
    shown = carriers or rank_passages(claim, page, args.top)
    return {"label": label, "evidence": shown[:args.top]}


def pieces(passages):
    """Passages in pieces of at most NLI_WORDS words: [[passage]]; a longer passage is cut."""
    out, room = [], 0
    for passage in passages:
        words = passage["text"].split()
        for start in range(0, len(words), NLI_WORDS):
            part = words[start:start + NLI_WORDS]
            if len(part) > room:
                out.append([])
                room = NLI_WORDS
            out[-1].append({**passage, "text": " ".join(part)})
            room -= len(part)
    return out


def load_nli(args):
    """f(documents, claim) -> P(supported) of each (the FactCG authors' input, class 1)."""
    import torch
    model, tokenizer, _ = load_model(args.model or NLI, None, "float32", args.device,
                                     "AutoModelForSequenceClassification")

    @torch.inference_mode()
    def supported(documents, claim):
        scores = []
        for i in range(0, len(documents), 8):  # a page may be a book
            texts = [NLI_INPUT.format(document=d, claim=claim) for d in documents[i:i + 8]]
            inputs = tokenizer(texts, padding=True, return_tensors="pt", split_special_tokens=True)
            logits = model(**inputs.to(model.device)).logits.float()  # (8, 2)
            scores += logits.softmax(-1)[:, 1].tolist()
        return scores
    return supported


def nli(claim, topic, page, c, args, supported):
    found = pieces(page["passages"])
    if not found:
        return {"label": "NS", "score": 0.0, "evidence": []}
    scores = supported([" ".join(map(line_of, piece)) for piece in found], claim)
    best, score = max(zip(found, scores), key=lambda pair: pair[1])
    return {"label": "S" if score > 0.5 else "NS", "score": round(score, 4),
            "evidence": rank_passages(claim, indexed(best), args.top)}


def verdict(reply):
    found = re.fullmatch(r"(?i)\W*(?:(?:final )?(?:verdict|answer|judge?ment)\W*:)?"
                         r"\W*\[(supported|not supported)\]\W*", last_line(reply))
    return found and {"supported": "S", "not supported": "NS"}[found[1].lower()]


def llm(claim, topic, page, c, args, ask):
    """FactAlign's search and verdict (section 3.2): a query sees what those before it have found.
    A query that comes again finds nothing new and ends the search."""
    params = {"temperature": 0.0, "max_tokens": args.max_tokens, "seed": args.seed}
    evidence, queries = [], []

    def shown():
        return "\n".join(f"- {p['title']}: {line_of(p)}" for p in evidence) or "(nothing yet)"

    def next_query():
        found = ask(template("query", topic=topic, statement=claim, evidence=shown()),
                    lambda reply: re.fullmatch(r"(?i)\W*query:\W*(\w.*)", last_line(reply)),
                    f"Query: {claim}", **params)
        return found[1] if found else claim  # an answer without a query: the claim is one

    while len(queries) < (args.steps or 1):
        query = next_query() if args.steps else claim
        if query in queries:
            break
        queries.append(query)
        hits = rank_passages(query, page, args.top) if page else searched(c, query, args.top)
        evidence += [hit for hit in hits if hit not in evidence]
    label = ask(template("verdict", topic=topic, statement=claim, evidence=shown()), verdict,
                "[Supported]", **params)
    return {"label": label, "evidence": evidence, "queries": queries}


def rating(row, args, ask):
    """FLAME's instruction following (section 4.3): the mean of 3 judgements with reasons, or None;
    without a server whether the response passes the row's own check, as 5 or 1."""
    if not ask:
        return 5.0 if re.search(row.get("check") or args.check, row["response"].strip()) else 1.0
    asked = template("rate", prompt=as_messages(row["prompt"])[-1]["content"],
                     response=row["response"])
    form = r"(?i)\W*rating:\W*\[([1-5])\]\W*"
    marks = [ask(asked, lambda reply: re.fullmatch(form, last_line(reply)), "Rating: [3]",
                 temperature=0.7, max_tokens=args.max_tokens, seed=seed)
             for seed in range(args.seed, args.seed + 30, 10)]  # and a retry takes the next
    return None if None in marks else round(sum(int(mark[1]) for mark in marks) / 3, 4)


# ---------------------------------------------------------------------------------------------
# Sampled answers: what the model itself believes (FactTune-MC) and knows (APEFT)

def question_of(row):
    """What joins facts and sampled answers: 02's question, or its prefix to go on from."""
    return row.get("question") or row.get("prefix")


def short_answer(sample):
    """What a sample answers: its first line, after a prefix its first clause, no cut last word."""
    said = answer = sample["response"].strip().split("\n")[0].strip()
    if sample.get("prefix"):
        for start, end in rules.sentences(said)[:1]:
            answer = re.split(r"[,;:](?=\s)", said[start:end])[0].rstrip(".!?")
    cut = sample.get("finish") == "length" and sample["response"].strip() == answer
    return answer.rpartition(" ")[0] if cut else answer


def clusters(answers):
    """[[answer]]: each joins the first cluster whose first answer means the same, as FactTune's
    code has it: without case, punctuation and articles they are equal, of the same words, one the
    other's ending, or singular and plural."""
    out = {}  # by what their first answer is without these
    for answer in answers:
        a = " ".join(w for w in re.findall(r"\w+", answer.lower()) if w not in ("a", "an", "the"))
        like = next((b for b in out if a == b or a and b and (
            set(a.split()) == set(b.split()) or f" {a}".endswith(f" {b}")
            or f" {b}".endswith(f" {a}") or a + "s" == b or b + "s" == a)), a)
        out.setdefault(like, []).append(answer)
    return list(out.values())


def confidence(answers):
    """FactTune-MC's three statistics of n sampled answers, from the shares p of their clusters."""
    shares = [len(cluster) / len(answers) for cluster in clusters(answers)]
    return {"max": round(max(shares), 4), "exp": round(sum(p * p for p in shares), 4),
            "neg_ent": round(sum(p * math.log(p) for p in shares), 4)}


def knowledge(answers):
    """{"answers", "r", "known"} of judged answers [(text, label)]; null answers count nowhere."""
    counts = Counter(answers)
    labels = [label for _, label in answers if label is not None]
    r = round(labels.count("S") / len(labels), 4) if labels else None
    known = None if r is None else "unknown" if r == 0 else "known" if r == 1 else "potentially"
    return {"answers": [{"text": text, "label": label, "count": n}
                        for (text, label), n in counts.items()], "r": r, "known": known}


# ---------------------------------------------------------------------------------------------

def facts_of(row):
    return [fact for sentence in row["sentences"] for fact in sentence["facts"]]


def wrong_part(row, args):
    """What was expected inside a row's fields, or None: it is tried what the work will do."""
    try:
        if args.method == "rate":
            re.compile("" if args.model else row.get("check") or args.check)
        else:
            facts = sum((sentence["facts"] for sentence in row["sentences"]), [])  # lists only
            "".join(part for fact in facts for part in (fact["text"], question_of(fact) or ""))
            shown = [e for fact in facts for e in args.answers and fact.get("evidence") or []]
            "".join(part for e in shown for part in (e["text"], e.get("field", "")))
    except (re.error, OverflowError, RecursionError, LookupError, TypeError, AttributeError):
        return ("'check' as a regex (or --model and --base-url)" if args.method == "rate" else
                "'sentences' as [{'facts': [{'text': ..., 'question'?: ..., 'evidence'?: [{'text': "
                "..., 'field'?: ...}]}]}]")


def sampled_answers(args, rows):
    """{(topic, question): [answer]} of --answers; exits 2 where no fact of the rows asks these."""
    samples = read_jsonl(args.answers, {"topic": str, "response": str}, made_by="01_generate.py",
                         parts=lambda row: None if isinstance(question_of(row) or "", str) else
                         "'question' (or 'prefix') as text")
    args.answers_sha256 = digest(samples)
    found = {}
    for row in samples:
        if question_of(row) and short_answer(row):
            found.setdefault((row["topic"], question_of(row)), []).append(short_answer(row))
    if not found.keys() & {(row["topic"], question_of(f)) for row in rows for f in facts_of(row)}:
        die(f"{args.answers}: expected answers to what the facts of {args.inp} ask (by 02 "
            "--questions-out, then 01), found none")
    return found


def verify(row, args, answers, result):
    """The row with what was found out about its facts, or about it. result(*key) is what judge()
    says of (claim, topic), or of the row's id. Called twice: once so that result hears of all the
    work (what comes back is thrown away), once to collect it."""
    topic = row.get("topic")

    def fields(fact):
        if not args.answers and not fact.get("relevant", True):  # so 02 --relevance found
            return {"label": "IR", "kind": kind_of(fact["text"], topic), "evidence": []}
        if not args.answers:
            return result(fact["text"], topic)
        if not question_of(fact):
            return {}
        said = answers.get((topic, question_of(fact)), [])
        if args.method == "confidence":
            return {"conf": confidence(said) if said else None}
        opening = fact.get("prefix") or f'The answer to the question "{fact["question"]}" is:'
        return knowledge([(text, result(f"{opening} {text}", topic)["label"]) for text in said])

    if args.method == "rate":
        return {**row, "rating": result(row["id"])}
    return {**row, "sentences": [{**s, "facts": [{**fact, **fields(fact)} for fact in s["facts"]]}
                                 for s in row["sentences"]]}


def mark_repeats(row):
    """Set "repeats" on all but the first of the facts with equal words, the topic's own apart. Of a
    supported fact count only words that its evidence has, and directions, no praise: it repeats
    another of that field which has these and more. Said in ten ways, a thing is said once."""
    topic, first = {"is", "also", *rules.words(row["topic"])}, {}
    for fact in facts_of(row):
        fact.pop("repeats", None)
        said, field = frozenset(rules.words(fact["text"])) - topic, None
        shown = {"queries", "score"} & fact.keys()  # by llm and nli, as what they have read
        if fact.get("label") == "S" and fact.get("evidence") and not shown:
            field, said = fact["evidence"][0].get("field", ""), said - rules.FILLER
            there = {word for e in fact["evidence"] for word in rules.words(e["text"])}
            own = {w for w in said if w in there or re.fullmatch(rules.DIRECTION, w)}
            said = frozenset(own or filter(str.isalpha, said))
        first.setdefault((field, said), fact)
        fact["repeats"] = True
    for (field, said), fact in first.items():
        if field is None or not any(field == other and said < more for other, more in first):
            del fact["repeats"]


def judge_of(who, args, rows, c, ask):
    """judge(claim, topic), or with --method rate judge(id)."""
    if who == "rate":
        by_id = {row["id"]: row for row in rows}
        return lambda row_id: rating(by_id[row_id], args, ask)
    how = {"lexical": lexical, "nli": nli, "llm": llm}[who]
    tool = load_nli(args) if who == "nli" else ask

    def judge(claim, topic):
        wide = who == "llm" and args.open_search
        page = None if wide else open_page(topic, claim, c, args.open_search)
        found = how(claim, topic, page, c, args, tool) if page or wide else {"evidence": []}
        return {"label": None, "kind": kind_of(claim, topic), **found}
    return judge


def values(row, field):
    """What a row's facts, or with --method rate the row itself, have in a field, where they do."""
    return [part[field] for part in ([row] if field == "rating" else facts_of(row))
            if field in part]


def summary(rows, field):
    """The closing block's numbers of verdicts, or of what the model knows."""
    def count(name):
        return Counter(value for row in rows for value in values(row, name))

    if field == "label":
        n, kinds = count("label"), count("kind").most_common()
        checked = n["S"] + n["NS"]
        return {"supported": n["S"], "not_supported": n["NS"], "irrelevant": n["IR"],
                "precision_with_repeats": round(n["S"] / checked, 4) if checked else None,
                "kinds": ", ".join(f"{kind} {times}" for kind, times in kinds)}
    if field == "r":
        return {name: count("known")[name] for name in ("unknown", "potentially", "known")}
    return {}


def main():
    args = parse_args()
    who = args.judge if args.method == "answers" else args.method
    needs = {"prompt": (str, list), "response": str} if who == "rate" else (
        {"sentences": list, "topic": str})
    rows = read_jsonl(args.inp, needs, "02_decompose.py", parts=lambda row: wrong_part(row, args))
    answers = sampled_answers(args, rows) if args.answers else None
    c = None if who in ("rate", "confidence") else {**corpus.open_corpus(args.corpus), "open": {}}
    args.corpus_sha256 = c and corpus.digest(c)
    for topic in {row["topic"] for row in rows} if c else ():
        corpus.passages_of(c, corpus.find_page(c, topic)[0])  # bad pages show before OUT is made
    ask, spent = None, {}
    if who == "llm" or who == "rate" and args.model:
        args.prompts_sha256 = digest(map(template, ("query", "verdict", "rate")))
        ask, spent = chat(args)
    field = {"rate": "rating", "confidence": "conf", "answers": "r"}.get(args.method, "label")

    def again(row):
        return args.retry_null and None in values(row, field)

    with output(args, rows, again) as (done, write, fail), \
            workers(args.concurrency if ask else 1) as pool:
        todo = rows[:args.limit]
        fresh = [row for row in todo if row["id"] not in done]
        claims = {}  # each once, however many facts say it of one topic
        for row in fresh:
            verify(row, args, answers, lambda *key: claims.setdefault(key, {"label": None}))
        judge = judge_of(who, args, rows, c, ask) if claims else None
        jobs = {key: pool.submit(judge, *key) for key in claims}
        for row in progress(fresh, unit="row"):
            try:
                found = verify(row, args, answers, lambda *key: jobs[key].result())
            except ConnectionError as error:
                fail(row, error)
                continue
            if who != "rate":
                mark_repeats(found)
            write(found)
            done[row["id"]] = found
    there = [done[row["id"]] for row in todo if row["id"] in done]
    found = [value for row in there for value in values(row, field)]
    unjudged, failed = found.count(None), len(todo) - len(there)
    missing = {row["topic"] for row in there if field == "label" and None in values(row, field)
               and corpus.find_page(c, row["topic"])[0] is None}
    if missing:
        print(f"no page in {args.corpus} for: {', '.join(sorted(missing))}")
    elif unjudged and not args.dry_run:
        why = f" from {args.answers}, which may lack their answers" if args.answers else ""
        print(f"{unjudged} could not be judged{why}: --retry-null tries again", file=sys.stderr)
    report(rows_in=len(todo), rows_out=len(there), failed=failed,
           **{"ratings" if who == "rate" else "facts": len(found)}, unjudged=unjudged,
           **summary(there, field), **spent)
    return 1 if unjudged or failed else 0


if __name__ == "__main__":
    run(main)
