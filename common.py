"""
If you are reading to understand a paper you can skip this file.

What no paper is about, written once: JSONL in and out, chat rendering, model loading, the closing
block. Every stage copies the row that it read and adds fields, appends whole lines and skips ids
already there (`kill -9` anywhere, the same command again: the same file), refuses to resume under
other flags or rows (OUT.args.json), and sets what failed aside in OUT.failed, exit 1. Bad input is
one line, `file:line: expected ..., found ...`, and exit 2; then nothing is written.
"""
import argparse
import hashlib
import json
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

# Flags that say where or how fast, never what. All others are content: a resumed run repeats them.
NOT_CONTENT = {"inp", "out", "limit", "overwrite", "retry_null", "dry_run", "concurrency", "device"}
STARTED = time.time()


def die(message):
    """Bad input or bad flags: one line on stderr, exit 2, no traceback."""
    print(message, file=sys.stderr)
    sys.exit(2)


def arguments(docstring, inp="--in"):
    """An ArgumentParser that shows the stage's header, with the flags that all stages share."""
    p = argparse.ArgumentParser(description=docstring,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(inp, dest="inp", required=True, metavar="FILE", help="JSONL to read")
    p.add_argument("--out", required=True, metavar="FILE", help="JSONL to write, or resume")
    p.add_argument("--seed", type=int, default=0, help="seed of everything random here")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    p.add_argument("--overwrite", action="store_true", help="start OUT anew instead of resuming it")
    return p


def run(main):
    """Call a stage's main(); Ctrl-C exits 130 and leaves whole lines behind."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------
# JSONL in

def read_jsonl(path, required=(), made_by="", unique=True):
    """All rows of `path` as dicts, validated whole: an error names file, line and what is expected.

    `required` maps a field to its type (or to a tuple of types). Rows without an id get
    `<file stem>-<line>`; `output` (FActScore's name) is read as `response`.
    """
    required = {"id": str, **dict(required)}
    path = Path(path)
    if not path.is_file():
        die(f"{path}: no such file" + (f"; {made_by} makes it" if made_by else ""))
    rows, seen = [], {}
    with open(path, encoding="utf-8", errors="replace") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                die(f"{path}:{n}: expected one JSON object a line, found {line.strip()[:60]!r}")
            if not isinstance(row, dict):
                die(f"{path}:{n}: expected a JSON object, found {type(row).__name__}")
            if "output" in row and "response" not in row:
                row["response"] = row.pop("output")
            row.setdefault("id", f"{path.stem}-{n}")
            for field, kind in required.items():
                if not isinstance(row.get(field), kind):
                    found = f"{row[field]!r:.40}" if field in row else f"only {sorted(row)}"
                    kinds = kind if isinstance(kind, tuple) else (kind,)
                    names = " or ".join(k.__name__ for k in kinds)
                    source = f" ({made_by} writes it)" if made_by else ""
                    die(f"{path}:{n}: expected {field!r} as {names}{source}, found {found}")
            first = seen.setdefault(row["id"], n)
            if unique and first != n:
                die(f"{path}:{n}: expected a new id, found {row['id']!r} of line {first} again")
            rows.append(row)
    if not rows:
        die(f"{path}: expected at least one row, found an empty file")
    return rows


# ---------------------------------------------------------------------------------------------
# JSONL out: resumable, locked, honest about failures

def dumps(row):
    return json.dumps(row, ensure_ascii=False)


def write_whole(path, text):
    """Write a file that must never be seen half written: aside, then renamed."""
    aside = f"{path}.tmp"
    with open(aside, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def digest(rows):
    return hashlib.sha256("\n".join(map(dumps, rows)).encode()).hexdigest()


def same_run(out, args, rows):
    """Exit 2 where OUT was made under other flags or from other rows; else (path of OUT.args.json,
    its text for this run)."""
    memo, other = Path(f"{out}.args.json"), "Choose another --out or --overwrite"
    flags = {k: v for k, v in sorted(vars(args).items()) if k not in NOT_CONTENT}
    if out.exists() and not args.overwrite:
        if not memo.exists():
            die(f"{out} is there, but {memo.name} is not: no stage made it. {other}")
        old = json.loads(memo.read_text(encoding="utf-8"))
        was = old["flags"]
        changed = [f"--{k.replace('_', '-')} {was.get(k)} -> {flags.get(k)}"
                   for k in sorted(flags | was) if was.get(k) != flags.get(k)]
        if changed:
            die(f"{out} was made with other flags ({', '.join(changed)}). {other}")
        if len(rows) < old["rows"] or digest(rows[:old["rows"]]) != old["sha256"]:
            die(f"{out} was made from other rows than {args.inp} now holds. {other}")
    return memo, dumps({"flags": flags, "rows": len(rows), "sha256": digest(rows)}) + "\n"


def _lock(f, out):
    try:
        import fcntl
    except ImportError:  # Windows: no lock, everything else holds
        return
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(f"{out}: another process is writing it")


def _whole_lines(f):
    """Rows already in an output opened "a+b"; cuts off what a kill left behind the last newline."""
    f.seek(0)
    data = f.read()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        f.truncate(end)
    return [json.loads(line) for line in data[:end].splitlines()]


@contextmanager
def output(args, rows):
    """Open args.out to resume it. Yields (done, write, fail).

    done    {id: row} of the rows already there
    write   write(row) appends one whole line, at once
    fail    fail(row, reason) sets a row aside in OUT.failed, which is rewritten each run
    """
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    memo, text = same_run(out, args, rows)
    failed = Path(f"{out}.failed")
    with open(out, "a+b") as f:
        _lock(f, out)
        if args.overwrite:
            f.truncate(0)
        write_whole(memo, text)
        done = {row["id"]: row for row in _whole_lines(f)}
        failed.unlink(missing_ok=True)

        def write(row):
            f.write(dumps(row).encode() + b"\n")
            f.flush()

        def fail(row, reason):
            with open(failed, "a", encoding="utf-8", newline="\n") as g:
                g.write(dumps({**row, "error": str(reason)}) + "\n")

        yield done, write, fail


def progress(items, **kwargs):
    """tqdm on stderr; silent when stderr is not a terminal."""
    from tqdm import tqdm
    return tqdm(items, file=sys.stderr, disable=None, **kwargs)


def report(**numbers):
    """The closing block of every stage, on stderr."""
    print("---", file=sys.stderr)
    for key, value in {**numbers, "seconds": round(time.time() - STARTED, 1)}.items():
        print(f"{key + ':':<18}{value}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# Models and chat: 01 samples, 05 trains and 06 compares on exactly these tokens

def as_messages(prompt):
    """A prompt is a string (one user turn) or a list of {role, content}."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def load_model(name, adapter=None, dtype="bfloat16", device=None):
    """(model in eval mode, tokenizer, device) of a folder or hub name; adapter: a PEFT folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()
    if re.match(r"[./~]|data/|runs/", name) and not Path(name).expanduser().is_dir():
        die(f"{name}: no such model folder; `python data/prepare.py` makes data/world/model")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    if adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter)
    if tokenizer.chat_template is None:
        die(f"{name}: its tokenizer has no chat template; give a chat model")
    return model.to(device).eval(), tokenizer, device


def prompt_ids(tokenizer, messages, prefix=""):
    """Token ids of a chat prompt up to where the assistant speaks, plus the words put in its mouth.
    Markup in the messages (`<|im_end|>` in a corpus, say) is broken up first: it closes no turn.
    """
    special = sorted((t for t in tokenizer.all_special_tokens if len(t) > 1), key=len, reverse=True)

    def plain(text):
        for token in special:
            text = text.replace(token, token[0] + " " + token[1:])
        return text

    clean = [{**m, "content": plain(m["content"])} for m in messages]
    text = tokenizer.apply_chat_template(clean, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + plain(prefix), add_special_tokens=False)["input_ids"]
