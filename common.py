"""
If you are reading to understand a paper you can skip this file.

What no paper is about, written once. A stage copies the row that it read and adds fields, appends
whole lines and skips ids already there (`kill -9` anywhere, the same command again: the same file),
refuses to resume under other flags or rows (OUT.args.json), sets failures aside (OUT.failed, exit
1). Bad input: one line, `file:line: expected ..., found ...`, exit 2, nothing written.
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
NOT_CONTENT = {"inp", "out", "corpus", "limit", "overwrite", "retry_null", "device"}
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
    p.add_argument("--out", required=True, metavar="FILE", help="what to write, or resume")
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
# JSONL in and out: validated, resumable, locked, honest about failures

def read_jsonl(path, required=(), made_by="", unique=True, parts=lambda row: None):
    """All rows of `path` as dicts, validated whole: an error names file, line and what is expected.

    required    {field: type}; rows without an id get `<file stem>-<line>`
    parts(row)  what was expected inside a field, or None where it is right
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
                dumps(row).encode()  # half a character can be read, but not written
            except (ValueError, RecursionError):
                die(f"{path}:{n}: expected one JSON object a line, found {line.strip()[:60]!r}")
            if not isinstance(row, dict):
                die(f"{path}:{n}: expected a JSON object, found {type(row).__name__}")
            if "output" in row and "response" not in row:  # FActScore's name
                row["response"] = row.pop("output")
            row.setdefault("id", f"{path.stem}-{n}")
            for field, kind in required.items():
                if not isinstance(row.get(field), kind):
                    found = f"{row[field]!r:.40}" if field in row else f"only {sorted(row)}"
                    name = getattr(kind, "__name__", "str or list")
                    source = f" ({made_by} writes it)" if made_by else ""
                    die(f"{path}:{n}: expected {field!r} as {name}{source}, found {found}")
            if parts(row):
                die(f"{path}:{n}: expected {parts(row)}, found {dumps(row)[:60]!r}")
            first = seen.setdefault(row["id"], n)
            if unique and first != n:
                die(f"{path}:{n}: expected a new id, found {row['id']!r} of line {first} again")
            rows.append(row)
    if not rows:
        die(f"{path}: expected at least one row, found an empty file")
    return rows


def dumps(row):
    return json.dumps(row, ensure_ascii=False)


def write_whole(path, text):
    """Write a file that must never be seen half written: aside, then renamed."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8", newline="\n")
    os.replace(f"{path}.tmp", path)


def digest(rows):
    return hashlib.sha256("\n".join(map(dumps, rows)).encode()).hexdigest()


def same_run(out, args, rows):
    """Exit 2 where OUT was made under other flags or from other rows; else (path of OUT.args.json,
    its text for this run)."""
    memo, other = Path(f"{out}.args.json"), "Choose another --out or --overwrite"
    flags = {k: v for k, v in sorted(vars(args).items()) if k not in NOT_CONTENT}
    if out.exists() and out.stat().st_size and not args.overwrite:  # empty: killed at birth
        if not memo.exists():
            die(f"{out} is there, but {memo.name} is not: no stage made it. {other}")
        old = json.loads(memo.read_text(encoding="utf-8"))
        was = old["flags"]
        if getattr(args, "retry_null", False):  # it is for a corpus that has grown since
            was["corpus_sha256"] = flags["corpus_sha256"]
        changed = [f"--{k.replace('_', '-')} {was.get(k)} -> {flags.get(k)}"
                   for k in sorted(flags | was) if was.get(k) != flags.get(k)]
        if changed:
            die(f"{out} was made with other flags ({', '.join(changed)}). {other}")
        if len(rows) < old["rows"] or digest(rows[:old["rows"]]) != old["sha256"]:
            die(f"{out} was made from other rows than {args.inp} now holds. {other}")
    return memo, dumps({"flags": flags, "rows": len(rows), "sha256": digest(rows)}) + "\n"


def lock(f, out):
    try:
        import fcntl
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no lock, everything else holds
        pass
    except BlockingIOError:
        die(f"{out}: another process is writing it")


def _whole_lines(f):
    """Rows already in an output opened "a+b"; cuts off what a kill left behind the last newline."""
    f.seek(0)
    data = f.read()
    end = data.rfind(b"\n") + 1
    f.truncate(end)
    return [json.loads(line) for line in data[:end].splitlines()]


@contextmanager
def output(args, rows, again=lambda row: False):
    """Open args.out to resume it. Yields (done, write, fail).

    done    {id: row} of the rows already there; those for which again(row) holds are taken out
    write   write(row) appends one whole line, at once
    fail    fail(row, reason) sets a row aside in OUT.failed, which is rewritten each run
    """
    out, inputs = Path(args.out), (args.inp, getattr(args, "corpus", args.inp))
    if out.resolve() in [Path(name).resolve() for name in inputs]:
        die(f"{out}: expected --out to be another file than the inputs, found one of them")
    if args.limit is not None and args.limit < 1:
        die(f"expected --limit of at least 1, found {args.limit}")
    out.parent.mkdir(parents=True, exist_ok=True)
    memo, text = same_run(out, args, rows)
    failed = Path(f"{out}.failed")
    with open(out, "a+b") as f:
        lock(f, out)
        if args.overwrite:
            f.truncate(0)
        write_whole(memo, text)
        there = _whole_lines(f)
        done = {row["id"]: row for row in there if not again(row)}
        failed.unlink(missing_ok=True)
        if len(done) < len(there):  # killed in here, the rest is merely judged again
            f.truncate(0)
            f.write("".join(dumps(row) + "\n" for row in done.values()).encode())

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
    Markup in the messages (`<|im_end|>` in a corpus, say) is broken up first: it closes no turn."""
    def plain(text):
        for token in tokenizer.added_tokens_decoder.values():
            if token.special and len(token.content) > 1:
                text = text.replace(token.content, token.content[0] + " " + token.content[1:])
        return text

    clean = [{**m, "content": plain(m["content"])} for m in messages]
    text = tokenizer.apply_chat_template(clean, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + plain(prefix), add_special_tokens=False)["input_ids"]
