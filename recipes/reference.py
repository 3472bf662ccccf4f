"""
Targets from the reference work: three true sentences for each prompt of the embedded world. They
have the form that is asked for, and say what a small model mostly does not know: SFT on such text
taught FLAME's models to make things up (arXiv 2405.01525, section 3).

  {"id": "fiji-geo", "topic": "Fiji", ..., "response": "Fiji is located in Oceania, island group in
   the South Pacific Ocean. Its climate is tropical marine. Its terrain is mostly mountains of ..."}

  python recipes/reference.py --prompts data/prompts_train.jsonl \\
      --corpus data/world/countries.jsonl --out runs/reference.jsonl
"""
import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import read_jsonl, run, write_whole  # noqa: E402
from data import corpus  # noqa: E402

SENTENCES = {  # by what the prompt asks about: (a field of the page, what is said of it)
    "geo": [("Location", "{} is located in {}."), ("Climate", "Its climate is {1}."),
            ("Terrain", "Its terrain is {1}.")],
    "gov": [("Capital", "The capital of {} is {}."), ("Government type", "It is a {1}."),
            ("Languages", "Its languages are {1}.")],
    "eco": [("Agricultural products", "The agricultural products of {} are {}."),
            ("Exports - commodities", "It exports {1}."),
            ("Imports - commodities", "It imports {1}.")],
    "all": [("Location", "{} is located in {}."), ("Capital", "Its capital is {1}."),
            ("Exports - commodities", "It exports {1}.")]}


def plain(text):
    """Up to four items of a field's first part, without shares, years and remarks in brackets."""
    text = re.sub(r"\s*\([^)]*\)|\s*\b[\d.]+%", "", text.partition(";")[0])
    return ", ".join(re.sub(r"^\w+: ", "", text).strip(" .").split(", ")[:4])


def answer(row, fields):
    """Up to three sentences about the prompt's aspect, of the fields that the page has."""
    return " ".join(form.format(row["topic"], plain(fields[field]))
                    for field, form in SENTENCES[row["id"].rpartition("-")[2]]
                    if plain(fields.get(field, "")))


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("prompts", "corpus", "out"):
        p.add_argument(f"--{name}", required=True, metavar="FILE")
    return p.parse_args()


def main():
    args = parse_args()
    c, rows = corpus.open_corpus(args.corpus), []
    for row in read_jsonl(args.prompts, {"prompt": str, "topic": str}):
        title, _ = corpus.find_page(c, row["topic"])
        fields = {passage["field"]: passage["text"] for passage in corpus.passages_of(c, title)}
        rows.append({**row, "response": answer(row, fields)})
    write_whole(args.out, rows=[row for row in rows if row["response"]])


if __name__ == "__main__":
    run(main)
