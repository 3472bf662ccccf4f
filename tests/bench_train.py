"""
05_train.py side by side with TRL: pairs a second, memory, the loss itself. `make bench`, 20 min.

Both train the embedded model on the same rows in the same order with AdamW at one constant rate, in
turn, in processes of their own; the reference's log-probs are timed on both sides, loading is not.
TRL is not a dependency: this script puts the release below into runs/bench/trl, without what it
needs, which is installed anyway, and gradient checkpointing, its default, is off as it is here.
"""
import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from conftest import ROOT, read_rows, stage, write_rows

TRL = "trl==1.9.0"
BENCH = ROOT / "runs" / "bench"
MODEL = ROOT / "data" / "world" / "model"
DPO, KTO = ["--loss", "dpo"], ["--loss", "kto"]
# rows, then the flags of 05; TRL takes --batch rows as its batch, --accumulate times
JOBS = {
    "best-vs-rest": ("best", [*DPO, "--batch", 9]),
    "all-pairs": ("all", [*DPO, "--batch", 45]),
    "kto": ("kto", [*KTO, "--batch", 8]),
    "factalign": ("fkto", ["--loss", "factalign", "--batch", 8]),
    "curve": ("few", [*DPO, "--batch", 2, "--dtype", "float32"]),
    "memory": ("long", [*DPO, "--batch", 2]),
}


# ---------------------------------------------------------------------------------------------
# Rows: what the model itself says of 9 countries, ten times each

def said(text):
    return [{"role": "assistant", "content": text}]


def make_rows():
    prompts = BENCH / "prompts.jsonl"
    write_rows(prompts, [row for row in read_rows(ROOT / "data" / "prompts_train.jsonl")
                         if row["id"].endswith("-all")][:9])
    subprocess.run([sys.executable, ROOT / "01_generate.py", "--prompts", prompts, "--out",
                    BENCH / "samples.jsonl", "--n", "12"], cwd=ROOT, check=True)
    groups = {}
    for row in read_rows(BENCH / "samples.jsonl"):
        if row["finish"] == "stop":
            groups.setdefault(row["prompt_id"], []).append(row)
    groups = [group[:10] for group in groups.values() if len(group) >= 10][:8]
    messages = {row["prompt_id"]: [{"role": "user", "content": row["prompt"]}]
                for group in groups for row in group}

    def pair(a, b, name=""):
        return {"id": f"{a['id']}>{b['id']}", "prompt_id": name or a["prompt_id"],
                "prompt": messages[a["prompt_id"]], "chosen": said(a["response"]),
                "rejected": said(b["response"])}

    best = [pair(group[0], other) for group in groups for other in group[1:]]
    every = [pair(a, b) for group in groups[:2] for n, a in enumerate(group) for b in group[n + 1:]]
    few = [pair(group[n], group[n + 1], f"{n}{group[0]['id']}")
           for n in range(0, 10, 2) for group in groups][:40]
    kto = [{"id": row["id"], "prompt_id": row["prompt_id"], "prompt": messages[row["prompt_id"]],
            "completion": said(row["response"]), "label": n % 2 == 0}
           for n in range(10) for row in [group[n] for group in groups]]
    fkto = []
    for row in kto:
        sentences = [part.strip() + "." for part in row["completion"][0]["content"].split(". ")]
        fkto.append({**row, "completion_sentences": sentences,
                     "sentence_label": [n % 2 == 0 for n in range(len(sentences))]})
    texts = [" ".join(row["response"] for row in group) for group in groups]
    long = [pair({**group[0], "response": texts[n]}, {**group[1], "response": texts[n - 1]})
            for n, group in enumerate(groups)]
    for name, rows in {"best": best, "all": every, "few": few, "kto": kto, "fkto": fkto,
                       "long": long}.items():
        write_rows(BENCH / f"{name}.jsonl", rows)


# ---------------------------------------------------------------------------------------------
# The two sides, each in a process of its own; the last line that it prints is its result

class Peak(threading.Thread):
    """Resident memory, every 5 ms: the highest level above that after the first update."""

    def __init__(self):
        super().__init__(daemon=True)
        self.level = self.peak = None

    def now(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def first_update(self, optimizer, args, kwargs):
        if self.level is None:
            self.level = self.peak = self.now()

    def run(self):
        from torch.optim.optimizer import register_optimizer_step_post_hook
        register_optimizer_step_post_hook(self.first_update)
        while True:
            time.sleep(0.005)
            if self.level is not None:
                self.peak = max(self.peak, self.now())


def ours(job, microbatch):
    from unittest import mock
    rows, flags = JOBS[job]
    train, seconds, order = stage("05_train"), {}, []

    def timed(name):
        real = getattr(train, name)

        def call(model, steps, *rest):
            began = time.time()
            found = real(model, steps, *rest)
            seconds[name] = time.time() - began
            order[:] = [row["id"] for step in steps for row in step]
            return found
        return mock.patch.object(train, name, call)

    out = BENCH / f"ours-{job}"
    for path in BENCH.glob("reference-*"):
        path.unlink()
    argv = ["05_train.py", "--prefs", BENCH / f"{rows}.jsonl", "--out", out, "--overwrite",
            "--full", "--model", MODEL, "--device", "cpu", "--schedule", "constant", "--warmup", 0,
            "--save-every", "0", *flags, "--microbatch", microbatch]
    with (mock.patch.object(sys, "argv", list(map(str, argv))), timed("train"),
          timed("reference_logps"), timed("fingerprint")):
        train.main()
    log = read_rows(out / "log.jsonl")
    return {"seconds": sum(seconds.values()), **seconds, "losses": [row["loss"] for row in log],
            "order": order}


def theirs(job, precompute):
    sys.path.insert(0, str(BENCH / "trl"))
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    name, flags = JOBS[job]
    batch = int(flags[flags.index("--batch") + 1])
    bf16 = "float32" not in flags
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    rows = {row["id"]: row for row in read_rows(BENCH / f"{name}.jsonl")}
    order = json.loads((BENCH / f"ours-{job}.json").read_text(encoding="utf-8"))["order"]
    table = []
    for row in (rows[key] for key in order):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False,
                                               add_generation_prompt=True)
        sides = {side: row[side][0]["content"] for side in ("chosen", "rejected", "completion")
                 if side in row}
        table.append({"prompt": prompt, **sides, **{k: row[k] for k in row if k == "label"}})
    Config, Trainer = ((trl.KTOConfig, trl.KTOTrainer) if "label" in table[0] else
                       (trl.DPOConfig, trl.DPOTrainer))
    split = 5 if batch > 9 else 1  # 45 pairs do not fit at once: five times nine
    config = Config(output_dir=str(BENCH / "theirs"), use_cpu=True, bf16=bf16, beta=0.1,
                    per_device_train_batch_size=batch // split, gradient_accumulation_steps=split,
                    learning_rate=1e-5, lr_scheduler_type="constant", num_train_epochs=1,
                    train_sampling_strategy="sequential", precompute_ref_log_probs=precompute,
                    gradient_checkpointing=False, save_strategy="no", logging_steps=1,
                    report_to=[], disable_tqdm=True)
    began = time.time()
    trainer = Trainer(model=model, args=config, train_dataset=Dataset.from_list(table),
                      processing_class=tokenizer)
    before = time.time() - began
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"seconds": time.time() - began, "before": before, "losses": losses}


def run_side(side, job, *more):
    """The result of one side of a job, run now, kept as runs/bench/<side>-<job>.json."""
    print(f"{side} {job} {' '.join(map(str, more))}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, __file__, "--side", side, "--job", job, *map(str, more)],
                          cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{side} {job} failed")
    result = json.loads(done.stdout.splitlines()[-1])
    (BENCH / f"{side}-{job}.json").write_text(json.dumps(result), encoding="utf-8")
    return result


def parse_args():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--side", choices=["ours", "theirs"])
    p.add_argument("--job", choices=[*JOBS])
    p.add_argument("--precompute", action="store_true")
    p.add_argument("--microbatch", default=64)
    return p.parse_args()


def main():
    args = parse_args()
    if args.side:
        peak = Peak()
        peak.start()
        found = (ours(args.job, args.microbatch) if args.side == "ours" else
                 theirs(args.job, args.precompute))
        print(json.dumps({**found, "mb": ((peak.peak or 0) - (peak.level or 0)) / 1e6}))
        return
    BENCH.mkdir(parents=True, exist_ok=True)
    if not (BENCH / "trl" / "trl").exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target",
                        BENCH / "trl", TRL], check=True)
    make_rows()
    known, jobs = {}, [args.job] if args.job else [*JOBS]

    def of(side, job, *more):
        if (side, job, more) not in known:
            known[side, job, more] = run_side(side, job, *more)
        return known[side, job, more]

    print("| work | 05 | TRL | TRL / 05 | aim |\n|---|---|---|---|---|", flush=True)
    for what, figure, aim, mine, its in (
            ("DPO, best against 9, s", "seconds", 1.8, ["best-vs-rest"], ["--precompute"]),
            ("DPO, all 45 pairs of 10, s", "seconds", 6, ["all-pairs"], ["--precompute"]),
            ("KTO, TRL as it comes, s", "seconds", 1.3, ["kto"], []),
            ("KTO, TRL with precompute, s", "seconds", 1.0, ["kto"], ["--precompute"]),
            ("peak memory, 500 tokens, MB", "mb", 1.67, ["memory"], ["--precompute"]),
            ("the same, --microbatch 1, MB", "mb", 1.67, ["memory", "--microbatch", 1],
             ["--precompute"])):
        if mine[0] in jobs:
            a, b = of("ours", *mine)[figure], of("theirs", mine[0], *its)[figure]
            print(f"| {what} | {a:.1f} | {b:.1f} | {b / a:.2f} | {aim} |", flush=True)
    if "factalign" in jobs:
        a, b = of("ours", "factalign")["seconds"], of("ours", "kto")["seconds"]
        print(f"\nFactAlign costs {a / b:.2f} x KTO in 05 (aim: 1.1)")
    if "curve" in jobs:
        a, b = of("ours", "curve")["losses"], of("theirs", "curve", "--precompute")["losses"]
        print("\nDPO in fp32, the same two pairs a step\n\n| step | 05 | TRL |\n|---|---|---|")
        for n, (mine, its) in enumerate(zip(a, b, strict=True)):
            print(f"| {n} | {mine:.6f} | {its:.6f} |")


if __name__ == "__main__":
    main()
