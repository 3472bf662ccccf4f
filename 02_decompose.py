"""
Stage 2. Take responses apart: sentences with exact character spans, then facts that stand alone.

Reads   samples.jsonl   {"id", "topic", "response", "finish", ...}; FActScore's {"topic", "output"}
Writes  facts.jsonl     the same rows, each with its sentences:
  {..., "sentences": [{"text": "It is landlocked and borders Peru.", "start": 31, "end": 65,
                       "facts": [{"text": "Bolivia borders Peru"}, ...]}], "abstained": false}
  start and end are offsets into "response". When the response was cut ("finish": "length"), the
  unfinished last sentence keeps its span and gives no facts. A <think> block is passed over.
--questions-out Q       prompts for 01, each (topic, question or prefix) once; the facts get these:
  llm    {"id": "q-1f...", "topic": "Bolivia", "prompt": "Which ...? Answer in a few words.",
          "question": "Which ...?", "answer": "Peru", "fact": "...", "fact_based": true}
  rules  {..., "prompt": "State one fact about Bolivia.", "prefix": "Bolivia borders", ...}

--method rules (rules.py) cuts clauses, resolves pronouns, splits lists: about 5 facts in 60 words.
A prefix ends before the last name or number, else noun phrase (FactTune blanks each entity).
--method llm asks a server (data/prompts/): FActScore's facts of a sentence, no demonstration picked
by BM25; SAFE's revision so that they stand alone, all at once, by the response so far (an opening
that samples share is paid once); with --relevance, "relevant": false where one does not matter;
FactTune-MC's question, where there is one. A sentence without a reply sends its row to OUT.failed.

CPU, 2 seconds:  python 02_decompose.py --in runs/dev/samples.jsonl --out runs/dev/facts.jsonl
A server:  python 02_decompose.py --in S.jsonl --out F.jsonl --method llm --model M --base-url URL
"""
import os
import re

import rules
from common import (answer_of, arguments, chat, chat_arguments, die, digest, dumps, output,
                    progress, read_jsonl, report, run, template, workers, write_whole)

DECLINES = re.compile(r"\s*(?:i'?m sorry|i apologi[sz]e|as an ai\b|"
                      r"i (?:can ?not|can't|am unable|do not have|don't have))", re.IGNORECASE)
ITEM = re.compile(r"( *)(?:[-*\u2022]|\d{1,3}[.)]) +(\S.*?)\s*")
NONE = re.compile(r"(?im)^(?:1[.)])?\W*none\W*$")
PROMPTS = ("decompose", "revise", "relevant", "question")
VERDICT = r".*\[(Relevant|Irrelevant)\]\.?"
SMALL = rules.either(rules.LEXICON["filler"]) + r"(?![\w-])"
NOUNS = re.compile(rf"(?i)\b{SMALL} ((?:(?!{SMALL}|\w+ed\b(?! \w))[\w'\u2019-]+ ?)+)")
VERB = re.compile(rf"(?s)(?:\b{rules.VERB}|(?<= )[a-z]+(?:ed|[^s]s)\b).* $")  # and a blank


def parse_args():
    p = arguments(__doc__)
    p.add_argument("--method", default="rules", choices=["rules", "llm"], help="who takes apart")
    p.add_argument("--questions-out", metavar="FILE", help="also write prompts about the facts")
    p.add_argument("--model", help="the server's name of its model")
    p.add_argument("--relevance", action="store_true", default=None, help="mark stray facts")
    p.add_argument("--max-tokens", type=int, help="of a reply, its reasoning included (1024)")
    p.add_argument("--concurrency", type=int, default=16, help="calls at the same time")
    chat_arguments(p)
    args = p.parse_args()
    asks = args.model or args.base_url or args.relevance
    if args.concurrency < 1 or (args.method == "rules" and asks):
        die("expected --concurrency of 1 or more; --model, --base-url, --relevance for llm only")
    if os.path.realpath(args.questions_out or "") in map(os.path.realpath, (args.inp, args.out)):
        die(f"{args.questions_out}: expected --questions-out to be a file of its own")
    return args


def rule_facts(asking, row, sentence, end):
    return [{"text": fact, **(split_answer(fact, row["topic"]) if asking else {})}
            for fact in rules.facts(sentence, row["topic"])]


def split_answer(fact, topic):
    """{"prefix", "answer"} of a fact: its last name or number, else noun phrase, behind a verb."""
    apart = fact.replace(" and ", " ... ")  # as long; "Peru and Chile" are two answers
    names = sorted(m.span() for x in (rules.NAME, rules.NUMBER) for m in re.finditer(x, apart))
    own = rf"one|{rules.either(rules.words(topic))}(?:i?an|n|ese|i)?s?"  # Latvia, Latvian
    for start, end in reversed([m.span(1) for m in NOUNS.finditer(fact)] + names):
        before, answer = fact[:start], re.sub(r"(['\u2019]s)?[\s.,'\u2019-]*$", "", fact[start:end])
        other = not all(re.fullmatch(own, word) for word in rules.words(answer))
        if VERB.search(before) and other and not re.match(r"-?\w", fact[start + len(answer):]):
            return {"prefix": before[:-1], "answer": answer}
    return {}


def decompose(row, how=(rule_facts, False)):
    """A row of samples with "sentences" and "abstained" added. Pure: same row, same result."""
    text = row["response"]
    thought = re.match(r"\s*<think>.*?(</think>|$)", text, re.DOTALL)
    said = thought.end() if thought else 0
    spans = [(start + said, end + said) for start, end in rules.sentences(text[said:])]
    abstained = not spans or bool(DECLINES.match(text[said:].replace("\u2019", "'")))
    whole = 0 if abstained else spans[-1][0] if row.get("finish") == "length" else len(text)
    return {**row, "sentences": [
        {"text": text[start:end], "start": start, "end": end,
         "facts": how[0](*how[1:], row, text[start:end], end) if start < whole else []}
        for start, end in spans], "abstained": abstained}


# ---------------------------------------------------------------------------------------------
# Facts from an LLM. A parser returns None for a reply that is not what was asked for

def list_items(text):
    """A list's items, each once; [] for "None."; None for no list, or lists, headings in a list."""
    lines = [line.expandtabs() for line in text.split("\n") if line.strip()]
    found = [m for m in map(ITEM.fullmatch, lines) if m]
    items = [m[2] for m in found if not NONE.search(m[2])]
    if not items:
        return [] if NONE.search(text) else None
    inside = any(line.startswith(found[0][1] + " ") for line in lines)
    return None if inside or any(i.endswith(":") for i in items) else list(dict.fromkeys(items))


def numbered(text, n, form=r"(\S.*?)"):
    """What stands, in this form, in lines numbered 1 to n; None where there are not just these."""
    found = re.findall(rf"(?m)^[ \t]*(\d+)[.)][ \t]+{form}[ \t\r]*$", text)
    return [said for _, said in found] if [int(i) for i, _ in found] == [*range(1, n + 1)] else None


def question_of(text):
    """{"question", "answer"}, {} for "None."; the answer must not stand in the question."""
    found = re.findall(r"(?m)^\s*Question: *(\S.*[?\uff1f])\s*\n\s*Answer: *(\S.*?)\.?\s*$", text)
    if len(found) != 1:
        return {} if NONE.search(text) and not found else None
    told = re.search(rf"(?i)(?<!\w){re.escape(found[0][1])}(?!\w)", found[0][0])
    return None if told else dict(zip(("question", "answer"), found[0]))


def llm_facts(ask, args, row, sentence, end):
    """A sentence's facts by a server's model. ValueError where it never gives what is asked for."""
    topic, said = row["topic"], row["response"][:end].rpartition("</think>")[2].strip()
    likely = "\n".join(f"{i}. {text} [Relevant]"  # for --dry-run
                       for i, text in enumerate(rules.facts(sentence, topic), 1)) or "None."

    def put(name, parse, facts=(), *how):
        lines = "\n".join(f"{i}. {text}" for i, text in enumerate(facts, 1))
        prompt = template(name, sentence=sentence, topic=topic, text=said, fact="".join(facts),
                          facts=lines, request=dumps(row.get("prompt", topic)))
        found = ask(prompt, lambda reply: parse(answer_of(reply), *how), likely, temperature=0,
                    seed=args.seed, max_tokens=args.max_tokens or 1024)
        if found is None and name != "question":
            raise ValueError(f"{name}: no reply was what was asked for: {sentence!r:.80}")
        return found or {}

    texts = put("decompose", list_items)
    texts = texts and put("revise", numbered, texts, len(texts))
    facts = {text: {"text": text} for text in texts}
    judged = facts and args.relevance and put("relevant", numbered, facts, len(facts), VERDICT)
    for fact, verdict in zip(facts.values(), judged or []):
        fact |= {"relevant": False} if verdict == "Irrelevant" else {}
    for text in facts if args.questions_out else []:
        facts[text] |= {} if "relevant" in facts[text] else put("question", question_of, [text])
    return list(facts.values())


def questions(rows):
    """Prompts for 01 about the facts that carry a question or a prefix, each (topic, it) once."""
    found = {}
    for row, fact in [(row, f) for row in rows for s in row["sentences"] for f in s["facts"]]:
        topic, asked = row["topic"], fact.get("question")
        prompt = f"{asked} Answer in a few words." if asked else f"State one fact about {topic}."
        name = "q-" + digest([topic, asked or fact.get("prefix")])[:16]
        if "answer" in fact:
            ask = {key: fact[key] for key in ("question", "prefix", "answer") if key in fact}
            found.setdefault(name, {"id": name, "topic": topic, "prompt": prompt, **ask,
                                    "fact": fact["text"], "fact_based": True})
    return list(found.values())


def main():
    args = parse_args()
    rows = read_jsonl(args.inp, {"response": str, "topic": str}, made_by="01_generate.py")
    todo, llm, spent = rows[:args.limit], args.method == "llm", {}
    args.questions = args.questions_out and True  # where they go is no content, but this is
    if llm:
        args.prompts_sha256 = digest(map(template, PROMPTS))
        ask, spent = chat(args)
    with workers(args.concurrency) as pool, output(args, rows) as (done, write, fail):
        how = (pool.submit, llm_facts, ask, args) if llm else (rule_facts, args.questions)
        plan = ((row, decompose(row, how)) for row in todo if row["id"] not in done)
        for row, found in progress(list(plan) if llm else plan, unit="row"):  # llm: all begin now
            try:
                for sentence in found["sentences"] if llm else []:
                    sentence["facts"] = sentence["facts"] and sentence["facts"].result()
                write(found)
                done[row["id"]] = found
            except (ConnectionError, ValueError) as error:
                fail(row, error)
        asked = questions(done.values())
        if args.questions and not args.dry_run:
            write_whole(args.questions_out, "".join(dumps(row) + "\n" for row in asked))
    made = [done[row["id"]] for row in todo if row["id"] in done]
    facts = [fact for row in made for sentence in row["sentences"] for fact in sentence["facts"]]
    report(rows_in=len(todo), rows_out=len(made), failed=len(todo) - len(made),
           sentences=sum(len(row["sentences"]) for row in made), facts=len(facts),
           facts_a_response=round(len(facts) / max(len(made), 1), 2),
           abstained=sum(row["abstained"] for row in made), questions=len(asked),
           facts_asked=sum("answer" in fact for fact in facts), **spent)
    return int(len(made) < len(todo))


if __name__ == "__main__":
    run(main)
