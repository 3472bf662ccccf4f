"""What `make demo` promises: python tests/demo_check.py SFT/log.jsonl DPO/log.jsonl"""
import json
import math
import sys
from pathlib import Path
from statistics import fmean


def figures(path, name):
    rows = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    return [row[name] for row in rows if name in row]


before, *_, after = figures(sys.argv[1], "eval_loss")
losses = figures(sys.argv[2], "loss")
third = len(losses) // 3
first, last = fmean(losses[:third]), fmean(losses[-third:])
print(f"SFT, loss on the best responses about other countries: {before:.4f}, then {after:.4f}\n"
      f"DPO, loss at step 0: {losses[0]:.4f}; mean of the first third: {first:.4f}, of the last: "
      f"{last:.4f}")
assert after < before, "expected that SFT makes the best responses about other countries likelier"
assert abs(losses[0] - math.log(2)) < 2e-2, "expected ln 2 where policy is reference"
assert last < first, "expected a falling loss"
