"""
Stage 2. Take responses apart: sentences with exact character spans, then facts that stand alone.

Reads   samples.jsonl   {"id", "topic", "response", "finish", ...}; FActScore's {"topic", "output"}
Writes  facts.jsonl     the same rows, each with its sentences:
  {..., "sentences": [{"text": "It is landlocked and borders Peru.", "start": 31, "end": 65,
                       "facts": [{"text": "Bolivia is landlocked"},
                                 {"text": "Bolivia borders Peru"}]}], "abstained": false}
  start and end are offsets into "response". When the response was cut ("finish": "length"), the
  unfinished last sentence keeps its span and gives no facts. A reasoning block (<think>...</think>)
  is passed over.

--method rules (rules.py) cuts sentences into clauses, gives pronouns and bare fragments their
subject back, and makes one fact of each member of a list of neighbours, memberships or exports.

Not as in the papers: FActScore and FactTune ask an LLM for atomic facts, FLAME a tuned 7B; the
rules stand in where there is no key and no GPU, and are coarser: about 5 facts in 60 words.

CPU, 2 seconds:  python 02_decompose.py --in runs/dev/samples.jsonl --out runs/dev/facts.jsonl
"""
import re

import rules
from common import arguments, output, progress, read_jsonl, report, run

DECLINES = re.compile(r"\s*(?:i'?m sorry|i apologi[sz]e|as an ai\b|"
                      r"i (?:can ?not|can't|am unable|do not have|don't have))", re.IGNORECASE)


def parse_args():
    p = arguments(__doc__)
    p.add_argument("--method", default="rules", choices=["rules"], help="who takes sentences apart")
    return p.parse_args()


def decompose(row):
    """A row of samples with "sentences" and "abstained" added. Pure: same row, same result."""
    text = row["response"]
    thought = re.match(r"\s*<think>.*?(</think>|$)", text, re.DOTALL)
    said = thought.end() if thought else 0
    spans = [(start + said, end + said) for start, end in rules.sentences(text[said:])]
    abstained = not spans or bool(DECLINES.match(text[said:].replace("\u2019", "'")))
    sentences = []
    for start, end in spans:
        unfinished = row.get("finish") == "length" and (start, end) == spans[-1]
        facts = [] if unfinished or abstained else rules.facts(text[start:end], row["topic"])
        sentences.append({"text": text[start:end], "start": start, "end": end,
                          "facts": [{"text": fact} for fact in facts]})
    return {**row, "sentences": sentences, "abstained": abstained}


def main():
    args = parse_args()
    rows = read_jsonl(args.inp, {"response": str, "topic": str}, made_by="01_generate.py")
    facts = sentences = silent = 0
    with output(args, rows) as (done, write, _):
        todo = rows[:args.limit]
        for row in progress(todo, unit="row"):
            if row["id"] not in done:
                done[row["id"]] = decompose(row)
                write(done[row["id"]])
            found = done[row["id"]]
            facts += sum(len(sentence["facts"]) for sentence in found["sentences"])
            sentences += len(found["sentences"])
            silent += found["abstained"]
    report(rows_in=len(todo), rows_out=len(todo), sentences=sentences, facts=facts,
           facts_a_response=round(facts / len(todo), 2), abstained=silent)
    return 0


if __name__ == "__main__":
    run(main)
