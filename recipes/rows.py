"""
compare.sh's rows: a run's many files in one that is small enough to keep, and back.

pack    OUT.jsonl.gz: the rows of every NAME=FILE with "set": NAME, without the facts' evidence,
        which 03_verify.py finds again
unpack  DIR/<method>-<set>.jsonl of any number of <method><seed>.jsonl.gz: all seeds of a method
        in one file. 06 takes the mean over a prompt's responses, so also over the seeds

  python recipes/rows.py pack rft1.jsonl.gz sampled=tuned.jsonl greedy=tuned-greedy.jsonl
  python recipes/rows.py unpack runs/compare/all data/results/compare/*.jsonl.gz
"""
import argparse
import gzip
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import read_jsonl, run, write_whole  # noqa: E402


def pack(out, *files):
    """One gzipped file, the same bytes for the same rows."""
    lines = []
    for name, path in (file.split("=", 1) for file in files):
        for row in read_jsonl(path):
            for fact in [f for part in row.get("sentences", ()) for f in part.get("facts", ())]:
                fact.pop("evidence", None)
            lines.append(json.dumps({"set": name, **row}, ensure_ascii=False) + "\n")
    with open(out, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write("".join(lines).encode())


def unpack(folder, *files):
    sets = defaultdict(list)
    for path in sorted(files):
        name = Path(path).name.removesuffix(".jsonl.gz")
        method, seed = re.fullmatch(r"(.+?)(\d*)", name).groups()
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                sets[f"{method}-{row['set']}"].append({**row, "id": f"{row['id']}s{seed}"})
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        write_whole(Path(folder) / f"{name}.jsonl", rows=rows)


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["pack", "unpack"])
    p.add_argument("out", help="a file, or a folder")
    p.add_argument("files", nargs="+", metavar="FILE")
    return p.parse_args()


def main():
    args = parse_args()
    {"pack": pack, "unpack": unpack}[args.what](args.out, *args.files)


if __name__ == "__main__":
    run(main)
