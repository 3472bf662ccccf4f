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
import sqlite3
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

# Flags that say where or how fast, never what. All others are content: a resumed run repeats them.
INPUTS = ("inp", "corpus", "answers", "few_shot")
NOT_CONTENT = {*INPUTS, "out", "questions_out", "limit", "overwrite", "retry_null", "device",
               "base_url", "concurrency", "cache", "dry_run", "price_in", "price_out"}
STARTED = time.time()
ELSEWHERE = {  # errors of libraries that are imported where needed, and no fault of ours
    "OutOfMemoryError": "out of memory (a smaller --microbatch of 05, --batch of 01 needs less)",
    "SafetensorError": "weights that cannot be read or written"}


def die(message):
    """Bad input or bad flags: one line on stderr, exit 2, no traceback."""
    print(message, file=sys.stderr)
    sys.exit(2)


def arguments(docstring, inp="--in", required=True):
    """An ArgumentParser that shows the stage's header, with the flags that all stages share."""
    p = argparse.ArgumentParser(description=docstring, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(inp, dest="inp", required=required, metavar="FILE", help="JSONL to read")
    p.add_argument("--out", required=True, metavar="FILE", help="what to write, or resume")
    p.add_argument("--seed", type=int, default=0, help="seed of everything random here")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    p.add_argument("--overwrite", action="store_true", help="start OUT anew instead of resuming it")
    return p


def run(main):
    """Call a stage's main(); Ctrl-C exits 130 and leaves whole lines behind."""
    try:
        try:
            sys.exit(main())
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(141)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        os._exit(130)  # at once: calls under way are not waited for
    except (OSError, sqlite3.Error) as error:  # no such folder, no permission, no room
        die(error)
    except ModuleNotFoundError as error:
        die(f"{error}: . .venv/bin/activate first (`make world` makes it)")
    except Exception as error:
        if type(error).__name__ in ELSEWHERE:
            die(f"{ELSEWHERE[type(error).__name__]}: {' '.join(str(error).split()):.200}")
        traceback.print_exc()
        sys.exit(70)  # a fault of ours; 1 says that some rows failed or are not judged


# ---------------------------------------------------------------------------------------------
# JSONL in and out: validated, resumable, locked, honest about failures

def dumps(row):
    return json.dumps(row, ensure_ascii=False)


def is_prompt(value):
    """Text, or messages {role, content} whose role is a word: markup in it would open a turn."""
    return isinstance(value, str) or isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str)
        and isinstance(m.get("role"), str) and m["role"].isidentifier() for m in value)


def read_line(text):
    """The JSON of a line. ValueError, too, where a key comes twice, one of which would be lost, and
    of what could not be written again: half a character, what is no UTF-8, 1e999."""
    def each_once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    found = json.loads(text, object_pairs_hook=each_once,
                       parse_int=lambda n: int(n) if len(n) < 99 else float("inf"))
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    return found


def read_jsonl(path, required=(), made_by="", unique=True, parts=lambda row: None):
    """All rows of `path` as dicts, validated whole: an error names file, line and what is expected.

    required    {field: type}; rows without an id get `<file stem>-<line>`
    parts(row)  what was expected inside a field, or None where it is right
    """
    path, required, rows, first = Path(path), {"id": str, **dict(required)}, [], {}
    if not path.is_file():
        die(f"{path}: no such file" + ", but a folder" * path.is_dir()
            + f"; {made_by} makes such" * bool(made_by))
    with open(path, encoding="utf-8", errors="surrogateescape") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = read_line(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                die(f"{path}:{n}: expected JSONL, one JSON object a line, found "
                    f"{line.strip()[:60]!r}")
            if "output" in row and "response" not in row:  # FActScore's name
                row["response"] = row.pop("output")
            row.setdefault("id", f"{path.stem}-{n}")
            for field, kind in required.items():
                if not isinstance(row.get(field), kind):
                    name = getattr(kind, "__name__", "str or list")
                    source = "01_generate.py" if field in ("prompt_id", "response") else made_by
                    source = f" ({source} writes it)" * bool(made_by)
                    found = f"{row[field]!r:.40}" if field in row else f"only {sorted(row)}"
                    die(f"{path}:{n}: expected {field!r} as {name}{source}, found {found}")
            if "prompt" in required and not is_prompt(row["prompt"]):
                die(f"{path}:{n}: expected 'prompt' as text or messages {{role, content}}, found "
                    f"{dumps(row['prompt'])[:60]}")
            if wrong := parts(row):
                die(f"{path}:{n}: expected {wrong}, found {dumps(row)[:60]!r}")
            if unique and first.setdefault(row["id"], n) != n:
                die(f"{path}:{n}: expected a new id, found {row['id']!r} of line "
                    f"{first[row['id']]} again")
            rows.append(row)
    if not rows:
        die(f"{path}: expected at least one row, found an empty file")
    return rows


def write_whole(path, text="", rows=()):
    """Write a file that must never be seen half written: aside, then renamed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        f.writelines(dumps(row) + "\n" for row in rows)
    os.replace(f"{path}.tmp", path)


def digest(rows):
    """sha256 of the rows' lines, line by line: joined they may need more memory than the rows."""
    found = hashlib.sha256()
    for n, row in enumerate(rows):
        found.update(("\n" * (n > 0) + dumps(row)).encode())
    return found.hexdigest()


def same_run(out, args, rows):
    """Exit 2 where OUT was made under other flags or from other rows; else (path of OUT.args.json,
    its text for this run)."""
    memo, other = Path(f"{out}.args.json"), "Choose another --out or --overwrite"
    flags = {k: v for k, v in sorted(vars(args).items()) if k not in NOT_CONTENT}
    if out.exists() and out.stat().st_size and not args.overwrite:  # empty: killed at birth
        if not memo.exists():
            die(f"{out} is there, but {memo.name} is not: no stage made it. {other}")
        try:
            old = json.loads(memo.read_text(encoding="utf-8"))
            was, n, sha256 = old["flags"], old["rows"], old["sha256"]
        except (ValueError, KeyError, TypeError):
            die(f"{memo}: expected flags, rows and sha256 of {out.name}, found other. {other}")
        if getattr(args, "retry_null", False):  # it is for a corpus that has grown since
            was |= {k: flags[k] for k in ("corpus_sha256", "answers_sha256") if k in flags}
        changed = ["other text in data/prompts" if k == "prompts_sha256" else
                   f"other content of --{k[:-7]}".replace("_", "-") if k.endswith("_sha256") else
                   f"--{k.replace('_', '-')} {was.get(k)} -> {flags.get(k)}"
                   for k in sorted(flags | was) if was.get(k) != flags.get(k)]
        if changed:
            die(f"{out} was made with other flags ({', '.join(changed)}). {other}")
        if len(rows) < n or digest(rows[:n]) != sha256:
            die(f"{out} was made from other rows than {args.inp} now holds. {other}")
    return memo, dumps({"flags": flags, "rows": len(rows), "sha256": digest(rows)}) + "\n"


def lock(f, out):
    with suppress(ImportError):  # Windows: no lock, everything else holds
        import fcntl
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            die(f"{out}: another process is writing it")


def rows_there(out, data, again):
    """{id: row} of an output's bytes, without what a kill left behind the last newline."""
    done = {}
    for n, line in enumerate(data[:data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
            done |= {} if again(row) else {row["id"]: row}
        except (ValueError, TypeError, KeyError):
            die(f"{out}:{n}: expected a row that this stage wrote, found {line[:60]!r}")
    return done


@contextmanager
def output(args, rows, again=lambda row: False):
    """Open args.out to resume it. Yields (done, write, fail).

    done    {id: row} of the rows already there; those for which again(row) holds are taken out
    write   write(row) appends one whole line, at once
    fail    fail(row, reason) sets a row aside in OUT.failed, which is rewritten each run
    """
    out, failed, reasons = Path(args.out), Path(f"{args.out}.failed"), Counter()
    inputs = filter(None, (getattr(args, name, None) for name in INPUTS))
    if out.resolve() in [Path(name).resolve() for name in inputs]:
        die(f"{out}: expected --out to be another file than the inputs, found one of them")
    if args.limit is not None and args.limit < 1:
        die(f"expected --limit of at least 1, found {args.limit}")
    memo, text = same_run(out, args, rows)
    if getattr(args, "dry_run", False):
        data = b"" if args.overwrite or not out.exists() else out.read_bytes()
        yield rows_there(out, data, again), lambda row: None, lambda *row: None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a+b") as f:
        lock(f, out)
        if args.overwrite:
            f.truncate(0)
        write_whole(memo, text)
        f.seek(0)
        data = f.read()
        done = rows_there(out, data, again)
        failed.unlink(missing_ok=True)
        kept = "".join(dumps(row) + "\n" for row in done.values()).encode()
        if kept != data:  # killed in here, the rest is merely made again
            f.truncate(0)
            f.write(kept)

        def write(row):
            f.write(dumps(row).encode() + b"\n")
            f.flush()

        def fail(row, reason):
            reasons[str(reason)] += 1
            with open(failed, "a", encoding="utf-8", newline="\n") as g:
                g.write(dumps({**row, "error": str(reason)}) + "\n")

        yield done, write, fail
    for reason, n in reasons.most_common(1):
        print(f"{reasons.total()} rows are set aside in {failed}, {n} for: {reason}\n"
              "The same command tries them again", file=sys.stderr)


def progress(items, **kwargs):
    """tqdm on stderr; silent when stderr is not a terminal."""
    from tqdm import tqdm
    return tqdm(items, file=sys.stderr, disable=None, **kwargs)


def report(**numbers):
    """The closing block of every stage, on stderr; of --dry-run only what it would cost."""
    if "sent" in numbers:
        numbers = {key: numbers[key] for key in ("sent", "calls", "from_cache", "tokens_in",
                                                 "tokens_out", "cost") if key in numbers}
    if "cost" in numbers:
        numbers["cost"] = f"{numbers['cost']:.6f}"
    print("---", file=sys.stderr)
    for key, value in {**numbers, "seconds": round(time.time() - STARTED, 1)}.items():
        print(f"{key + ':':<17} {value}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# Chat with any OpenAI-compatible server: a good reply is paid once, a failed call is never a reply

TRIES = 3  # where a reply is not what was asked for
# Markers of turns in the usual chat templates: a server would obey them, whoever wrote them
MARKUP = re.compile(r"<(?=[|\uff5c]|/?s>|</?SYS>|(?:start|end)_of_turn>|[be]os>)|\[(?=/?INST\]|\|)")
VERDICT = re.compile(r"(?i)\[((?:not )?supported|(?:ir)?relevant|yes|no|tie)\]"
                     r"|(?<!\w)\[([ab]|\d+\.?\d*)\]")  # x[1] and x[a] are code
REFUSED = re.compile(r"(?i)\bnot\b|\bonly\b|unsupported|un(?:known|expected|recogni)|invalid|extra")


def chat_arguments(p):
    p.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible server: vLLM, Ollama, "
                   "llama.cpp, ...; its key, if it wants one, stands in OPENAI_API_KEY")
    p.add_argument("--cache", default="data/replies.sqlite", metavar="FILE",
                   help="good replies, kept by all that they depend on; '' keeps none")
    p.add_argument("--dry-run", action="store_true", help="send and write nothing; count calls, "
                   "tokens (of four characters) and money")
    p.add_argument("--price-in", type=float, default=0.0, help="of a million prompt tokens")
    p.add_argument("--price-out", type=float, default=0.0, help="of a million reply tokens")


def template(name, **fields):
    """data/prompts/NAME.txt with its fields, if any, filled in: one user turn. A verdict in a field
    loses its square brackets: no statement may hold its own verdict."""
    text = (Path(__file__).parent / f"data/prompts/{name}.txt").read_text(encoding="utf-8")
    fields = {key: VERDICT.sub(r"(\1\2)", value) for key, value in fields.items()}
    return [{"role": "user", "content": text.format(**fields) if fields else text}]


def refused_name(error, told, names, messages):
    """The parameter, of these names, that an error says the server does not take; else None."""
    for text in [message["content"] for message in messages]:
        for quoted in (text, dumps(text)[1:-1], repr(text)[1:-1]):
            told = told.replace(quoted, "")  # what a prompt says refuses nothing
    named = [name for name in names if name == error.param or re.search(rf"\b{name}\b", told)]
    if named and REFUSED.search(told):
        return error.param if error.param in named else named[0]


def caller(args, base, spent):
    """call(messages, params): (reply, prompt tokens, reply tokens) of the server at `base`. Faults
    are tried again, most by openai itself; a parameter not taken is left out or renamed."""
    import openai
    key = os.environ.get("OPENAI_API_KEY", "").strip() or (base or args.dry_run) and "EMPTY"
    if not args.model:
        die("expected --model, what the server calls its model, found none")
    if not key or not re.match("https?://.", base or "https://openai's own"):
        die(f"expected --base-url http://.../v1, or a key in OPENAI_API_KEY, found {base}")
    client = openai.OpenAI(base_url=base, api_key=key, max_retries=5, timeout=300)
    renamed, guard = {}, threading.Lock()  # {parameter not taken: its other name, or None}

    def call(messages, params):
        for _ in range(TRIES):
            sent = {renamed.get(name, name): value for name, value in params.items()}
            sent.pop(None, None)
            try:
                got = client.chat.completions.create(model=args.model, messages=messages,
                                                     extra_body=sent)
                said, finish = got.choices[0].message, got.choices[0].finish_reason
                thought = getattr(said, "reasoning", None) or getattr(said, "reasoning_content", "")
                text, thought = ((part or "").encode("utf-8", "replace").decode()
                                 for part in (said.content, thought))  # no half characters
                return ({"text": text, "finish": finish, "thought": thought},
                        int(getattr(got.usage, "prompt_tokens", 0) or 0),
                        int(getattr(got.usage, "completion_tokens", 0) or 0))
            except (AttributeError, TypeError, IndexError, ValueError, RecursionError):
                continue
            except openai.APIError as error:
                body = error.body if isinstance(error.body, dict) else {}
                told = str(body.get("message") or body.get("detail") or error)
                status = getattr(error, "status_code", "")
                shown = " ".join(f"{status} {told}".split()).replace(key, "***")[:300]
                name = status in (400, 422) and refused_name(
                    error, told, [name for name in params if name in sent], messages)
                if name:
                    with guard:
                        if name not in renamed:
                            print(f"{args.model} takes no {name}: {shown}", file=sys.stderr)
                        renamed[name] = "max_completion_tokens" if name == "max_tokens" else None
                    return call(messages, params)
                nobody = type(error.__cause__).__name__ == "ConnectError"
                if (nobody or status in (401, 404)) and not spent["calls"]:  # 403 may be one row
                    where = re.sub("//.*@", "//", str(base))
                    raise PermissionError(f"{args.model} at {where}: {shown} (Does it run there? A "
                                          "--base-url mostly ends in /v1)") from None
                raise ConnectionError(shown) from None
        raise ConnectionError("expected a chat completion, found something else")

    return call


def chat(args):
    """(ask, spent): ask(messages, parse, stand_in, tries, **params), from any thread, makes a call
    and returns parse({"text", "finish": "stop", "length" or another, "thought"}).

    parse     gives None for a reply that is not what was asked for; after `tries` of these, so
              does ask. No such reply is kept
    stand_in  a reply as it may be: with --dry-run the stage goes on as if it had come
    spent     calls, tokens and money so far, for report()
    Raises ConnectionError when a call failed, PermissionError when all would: run() exits 2 then.
    """
    base, dry = args.base_url or os.environ.get("OPENAI_BASE_URL"), args.dry_run
    spent, locks, guard = Counter(sent=0) if dry else Counter(), {}, threading.Lock()
    call = caller(args, base, spent)
    cache = args.cache if not dry or os.path.isfile(args.cache) else ""  # "": SQLite's own, for now
    try:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(cache, 60, check_same_thread=False, isolation_level=None)
        if {name for name, in db.execute("SELECT tbl_name FROM sqlite_master")} - {"replies"}:
            raise sqlite3.Error("other tables than a cache's")
        with suppress(sqlite3.OperationalError):  # another process is just doing it
            db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)")
    except (sqlite3.Error, OSError) as error:
        die(f"--cache {cache}: expected a SQLite file that can be written, found: {error}")

    def count(tokens_in=0, tokens_out=0, **numbers):
        with guard:
            spent.update(tokens_in=tokens_in, tokens_out=tokens_out, **numbers)
            if args.price_in or args.price_out:
                spent["cost"] += (tokens_in * args.price_in + tokens_out * args.price_out) / 1e6

    def ask(messages, parse, stand_in="", tries=TRIES, **params):
        messages = [{**m, "content": MARKUP.sub(r"\g<0> ", m["content"])} for m in messages]
        about = [base, args.model, messages, sorted(params.items())]
        name = hashlib.sha256(dumps(about).encode()).hexdigest()
        with guard:
            asked_before, mine = name in locks, locks.setdefault(name, threading.Lock())
        with mine:  # the same question at the same time is one call
            with guard:  # a read under way would keep this connection from waiting to write
                found = db.execute("SELECT reply FROM replies WHERE key = ?", [name]).fetchone()
            value = parse(json.loads(found[0])) if found else None
            if value is not None:
                count(from_cache=1)
                return value
            if dry:
                size = sum(len(message["content"]) for message in messages) // 4
                count(**({"from_cache": 1} if asked_before else
                         {"tokens_in": size, "tokens_out": params["max_tokens"], "calls": 1}))
                return parse({"text": stand_in, "finish": "stop", "thought": None})
            for _ in range(tries):
                reply, *tokens = call(messages, params)
                count(*tokens, calls=1)
                value = parse(reply)
                if value is not None:
                    with guard:
                        db.execute("REPLACE INTO replies VALUES (?, ?)", [name, dumps(reply)])
                    return value
                count(not_as_asked=1, **{"of_these_cut": 1} if reply["finish"] == "length" else {})
                params |= {"seed": params["seed"] + 1,  # else it would say the same again
                           "temperature": max(0.7, params["temperature"])}

    return ask, spent


def answer_of(reply):
    """What a finished reply says after its thoughts; "" where it was cut or is thought alone."""
    said = reply["text"].rpartition("</think>")[2]
    return said if reply["finish"] == "stop" and "<think>" not in said else ""


def last_line(reply):
    """Where a judge gives its verdict: the last line of a finished reply; "" if it has none."""
    return answer_of(reply).strip().rpartition("\n")[2].strip()


@contextmanager
def workers(n):
    """n threads; after an error or Ctrl-C, what has not begun never does."""
    pool = ThreadPoolExecutor(n)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# Models and chat: 01 samples, 05 trains and 06 compares on exactly these tokens

def as_messages(prompt):
    """A prompt is a string (one user turn) or a list of {role, content}."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def load_model(name, adapter=None, dtype="bfloat16", device=None, kind="AutoModelForCausalLM"):
    """(model in eval mode, tokenizer, device) of a folder or hub name; adapter: a PEFT folder."""
    import torch
    import transformers
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # peft asks for it
    if re.match(r"[./~]|data/|runs/", name) and not Path(name).expanduser().is_dir():
        die(f"{name}: no such model folder; `python data/prepare.py` makes data/world/model")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = getattr(transformers, kind).from_pretrained(name, dtype=getattr(torch, dtype))
        if adapter:
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError) as error:
        both = " with ".join(filter(None, (name, adapter)))
        die(f"{both}: expected a model (and adapter), found: {' '.join(str(error).split()):.300}")
    return model.to(device).eval(), tokenizer, device


def prompt_ids(tokenizer, messages, prefix=""):
    """Token ids of a chat prompt up to where the assistant speaks, plus the words put in its mouth.
    Markup in the messages (`<|im_end|>` in a corpus, say) is broken up first: it closes no turn."""
    def plain(text):
        for token in tokenizer.added_tokens_decoder.values():
            if token.special and len(token.content) > 1:
                text = text.replace(token.content, token.content[0] + " " + token.content[1:])
        return text

    if tokenizer.chat_template is None:
        die(f"{tokenizer.name_or_path}: its tokenizer has no chat template. Give a chat model "
            "(01_generate.py --few-shot can sample from a base model)")
    clean = [{**m, "content": plain(m["content"])} for m in messages]
    from jinja2 import TemplateError
    try:  # Qwen3 would think first, which is not trained on; Llama 3 would be told today's date
        text = tokenizer.apply_chat_template(clean, tokenize=False, add_generation_prompt=True,
                                             enable_thinking=False, date_string="26 Jul 2024")
    except TemplateError as error:  # no system role (Gemma), the same role twice
        die(f"{tokenizer.name_or_path}: expected a prompt that its chat template takes, found "
            f"{dumps(messages):.60}: {error}")
    return tokenizer(text + plain(prefix), add_special_tokens=False)["input_ids"]


@cache
def end_of_turn(tokenizer):
    """Id of the token that the chat template puts behind an answer. Gemma's and Phi's eos is
    another: trained on in its place it would leave the turn's own end as it was."""
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody"}]
    end = tokenizer.apply_chat_template(said, tokenize=False).rpartition("Nobody")[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in special), tokenizer.eos_token_id)
