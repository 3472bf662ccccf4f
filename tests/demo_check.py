"""What `make demo` promises of its training run: python tests/demo_check.py OUT/log.jsonl"""
import json
import math
import sys
from pathlib import Path
from statistics import fmean

rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
losses = [row["loss"] for row in rows if "loss" in row]
first, last = fmean(losses[:len(losses) // 3]), fmean(losses[-(len(losses) // 3):])
accuracy = [row for row in rows if "eval_loss" in row][-1]["eval_rewards/accuracies"]
print(f"loss at step 0: {losses[0]:.4f}; mean of the first third: {first:.4f}, of the last: "
      f"{last:.4f}; held-out preference accuracy: {accuracy:.1%}")
assert abs(losses[0] - math.log(2)) < 2e-2, "expected ln 2 where policy is reference"
assert last < first, "expected a falling loss"
assert accuracy > 0.5, "expected more than half of the held-out pairs in the right order"
