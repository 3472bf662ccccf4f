"""
Stage 2. Take responses apart: sentences with exact character spans, then facts that stand alone.

Reads   samples.jsonl   {"id", "topic", "response", "finish", ...}; FActScore's {"topic", "output"} too
Writes  facts.jsonl     the same rows, each with its sentences:
  {..., "sentences": [{"text": "It is landlocked and borders Peru.", "start": 31, "end": 65,
                       "facts": [{"text": "Bolivia is landlocked"}, {"text": "Bolivia borders Peru"}]}],
   "abstained": false}
  start and end are offsets into "response". When the response was cut ("finish": "length"), the unfinished
  last sentence keeps its span and gives no facts. A reasoning block (<think>...</think>) is passed over.

--method rules (rules.py) cuts sentences into clauses, gives pronouns and bare fragments their subject back,
and makes one fact of each member of a list of neighbours, memberships or exports.

Not as in the papers: FActScore and FactTune ask an LLM for atomic facts, FLAME a tuned 7B model; the rules
stand in where there is neither key nor GPU. Its facts are coarser: 4 to 5 a response of 50 words.

CPU, 2 seconds:  python 02_decompose.py --in runs/dev/samples.jsonl --out runs/dev/facts.jsonl
"""
import re

import rules
from common import arguments, output, progress, read_jsonl, report, run


def parse_args():
    p = arguments(__doc__)
    p.add_argument("--method", default="rules", choices=["rules"], help="who takes sentences apart")
    return p.parse_args()


def decompose(row):
    """A row of samples with its "sentences" and "abstained" added. Pure: same row, same result."""
    text = row["response"]
    thought = re.match(r"\s*<think>.*?(</think>|$)", text, re.DOTALL)
    offset = thought.end() if thought else 0
    spans = [(a + offset, b + offset) for a, b in rules.sentences(text[offset:])]
    abstained = rules.is_abstention(text[offset:])
    sentences = []
    for i, (start, end) in enumerate(spans):
        unfinished = row.get("finish") == "length" and i == len(spans) - 1
        texts = [] if unfinished or abstained else rules.facts(text[start:end], row["topic"])
        sentences.append({"text": text[start:end], "start": start, "end": end, "facts": [{"text": t} for t in texts]})
    return {**row, "sentences": sentences, "abstained": abstained}


def main():
    args = parse_args()
    rows = read_jsonl(args.inp, {"response": str, "topic": str}, made_by="01_generate.py")
    facts = spans = silent = 0
    with output(args, rows) as (done, write, _):
        for row in progress(rows[:args.limit], unit="row"):
            if row["id"] not in done:
                done[row["id"]] = decompose(row)
                write(done[row["id"]])
            found = done[row["id"]]
            facts += sum(len(s["facts"]) for s in found["sentences"])
            spans += len(found["sentences"])
            silent += found["abstained"]
        rows_out = len(rows[:args.limit])
    report(rows_in=rows_out, rows_out=rows_out, failed=0, sentences=spans, facts=facts,
           facts_a_response=round(facts / rows_out, 2), abstained=silent)
    return 0


if __name__ == "__main__":
    run(main)
