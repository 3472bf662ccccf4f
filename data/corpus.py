"""
A reference work: pages by title, passages by search. 03 asks it; prepare.py --corpus makes one.

JSONL   rows {"title", "text", "field"?}, one passage a row, all in memory
SQLite  FActScore's documents(title PRIMARY KEY, text), the passages of a text joined by SEPARATOR;
        opened read-only. Beside it stands FILE.fts5: tolerant titles, and an index of words that
        points into the texts and holds none. It is built once, when first needed or by `python
        data/prepare.py --corpus FILE`, and again where FILE has changed

Search is BM25 as SQLite's FTS5 has it (k1 1.2, b 0.75, English stems, no case, no diacritics) over
"title field text", for the rarest words of a query only: "the" costs most and says least. A query
is words, never syntax: AND, quotes and * mean nothing.
"""
import hashlib
import json
import os
import re
import sqlite3
import sys
import threading
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import rules
from common import die, dumps, progress, read_jsonl

SEPARATOR = "####SPECIAL####SEPARATOR####"  # FActScore's
MADE_FROM = "CREATE TABLE made_from (key TEXT, at TEXT, whole INTEGER);"  # at: how far it is
# Of a query: so many words, met in all told in a quarter of the passages, or in so many (50 ms of
# a core), but never in more than so many (1 s); the two rarest in any case
TERMS, FEW, MANY = 32, 50_000, 1_000_000
TITLED, NUMBERED = (f"SELECT title, text FROM documents WHERE {key} = ?"
                    for key in ("title", "rowid"))
WORDS = "unicode61 remove_diacritics 2"
INDEX = f"""
CREATE VIRTUAL TABLE passages USING fts5(text, content='', tokenize='porter {WORDS}');
INSERT INTO passages(passages, rank) VALUES ('hashsize', 33554432);
CREATE TABLE terms (term TEXT PRIMARY KEY, df INTEGER) WITHOUT ROWID;"""
SIDECAR = INDEX + """
CREATE TABLE starts (first INTEGER PRIMARY KEY, document INTEGER); -- its first passage's number
CREATE TABLE loose (form TEXT PRIMARY KEY, document INTEGER) WITHOUT ROWID;"""


def open_corpus(path):
    """The dict that the functions below take; exits 2 where FILE is no corpus."""
    c = {"path": Path(path), "titles": (), "pages": None, "index": None, "lock": threading.Lock(),
         "connections": threading.local()}
    if c["path"].is_file() and c["path"].open("rb").read(16) == b"SQLite format 3\0":
        try:
            if not one(documents(c), "SELECT rowid, title, text FROM documents"):
                die(f"{path}: expected at least one document, found an empty table")
        except sqlite3.Error as error:
            die(f"{path}: expected SQLite with a table documents(title, text), found: {error}")
        return c
    if c["path"].is_file() and c["path"].open("rb").read(4)[:2] in (b"\x1f\x8b", b"PA"):
        die(f"{path}: packed rows: `python data/prepare.py --corpus {path}` makes a corpus of them")
    rows = read_jsonl(path, {"title": str, "text": str}, made_by="data/prepare.py", unique=False,
                      parts=lambda p: None if isinstance(p.get("field", ""), str) else
                      "'field' as text")
    c["passages"] = [{k: p[k] for k in ("title", "field", "text") if k in p} for p in rows]
    c["pages"] = {}
    for passage in c["passages"]:
        c["pages"].setdefault(passage["title"], []).append(passage)
    c["titles"] = set(c["pages"])
    c["loose"] = {plain_title(title): title for title in c["pages"]}
    return c


def digest(c):
    """SHA-256 of a JSONL file's bytes. Of SQLite: of its size, number of rows, header (it counts
    commits) and 16 pieces of 64 KB. So any commit shows, but in WAL mode surely only new rows; an
    edit that goes past SQLite may hide between the pieces."""
    if c["pages"] is not None:
        return hashlib.sha256(c["path"].read_bytes()).hexdigest()
    size = c["path"].stat().st_size
    rows = one(documents(c), "SELECT count(*) FROM documents")[0]
    found = hashlib.sha256(f"{size} {rows}".encode())
    with open(c["path"], "rb") as f:
        for piece in range(16):
            f.seek(piece * size // 16)
            found.update(f.read(65536))
    return found.hexdigest()


def connect(path):
    """Read-only. Threads do not share one; garbage may be collected in any."""
    db = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, check_same_thread=False)
    db.text_factory = lambda text: text.decode(errors="replace")
    return db


def documents(c):
    """The user's file: this thread's connection."""
    mine = c["connections"]
    mine.documents = getattr(mine, "documents", None) or connect(c["path"])
    return mine.documents


def one(db, sql, *values):
    return db.execute(sql, values).fetchone()


def plain_title(title):
    """The tolerant form of a title: no case, no diacritics, no article, no punctuation."""
    plain = rules.ascii_lower(title)
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"^the ", "", plain)).strip()


def has_page(c, title):
    return title in c["titles"] or c["pages"] is None and one(documents(c), TITLED, title)


def find_page(c, topic):
    """(title of the topic's page, "title" or "alias"), or (None, None). An alias is the tolerant
    form of a title (of two the last), or another name in data/lexicon.json."""
    if has_page(c, topic):
        return topic, "title"
    form = plain_title(topic)
    if not form:  # no Latin letter, no digit: nothing must not match nothing
        return None, None
    if c["pages"] is not None:
        title = c["loose"].get(form)
    else:
        found = one(sidecar(c), "SELECT document FROM loose WHERE form = ?", form)
        title = found and one(documents(c), NUMBERED, *found)[0]
    if title is None:
        for alias, name in rules.LEXICON["aliases"].items():
            title = name if plain_title(alias) == form and has_page(c, name) else title
    return (None, None) if title is None else (title, "alias")


def cut(title, text):
    """The passages of a document. (FActScore's own hold marks of sentences.)"""
    parts = re.sub("</?s>", "", text).split(SEPARATOR)
    return [{"title": title, "text": part.strip()} for part in parts if part.strip()]


def passages_of(c, title):
    """The passages of a page, in order: [{"title", "field"?, "text"}]; [] where it is none."""
    if c["pages"] is not None:
        return c["pages"].get(title, [])
    found = one(documents(c), TITLED, title)
    if found and not isinstance(found[1], str):
        die(f"{c['path']}: expected the text of {title!r:.60} as text, found {found[1]!r:.40}")
    return cut(*found) if found else []


def search(c, query, top):
    """The `top` passages of all that fit the query best; [] where none has a word of it."""
    if c["pages"] is not None:
        with c["lock"]:  # threads share what lives in memory
            if c["index"] is None:
                c["index"] = sqlite3.connect(":memory:", check_same_thread=False)
                c["index"].executescript(INDEX)
                add(c["index"], 0, c["passages"])
                finish(c["index"])
            return [c["passages"][n] for n in ranked(c["index"], query, top)]
    hits, db = [], sidecar(c)
    for n in ranked(db, query, top):
        sql = "SELECT first, document FROM starts WHERE first <= ? ORDER BY first DESC"
        first, document = one(db, sql, n)
        hits.append(cut(*one(documents(c), NUMBERED, document))[n - first])
    return hits


def ranked(db, query, top):
    """Numbers of the best passages, ties by number."""
    known, chosen, met = [], [], 0
    size = 1 + (one(db, "SELECT max(id) FROM passages_docsize")[0] or 0)
    limit = min(max(FEW, size // 4), MANY)
    for stem, word in stems(query).items():
        found = one(db, "SELECT df FROM terms WHERE term = ?", stem)
        known += [(*found, word)] if found else []
    for df, word in sorted(known)[:TERMS]:
        met += df
        if met <= limit or len(chosen) < 2:
            chosen.append(f'"{word}"')
    sql = "SELECT rowid FROM passages WHERE passages MATCH ? ORDER BY bm25(passages), rowid LIMIT ?"
    return [n for n, in db.execute(sql, (" OR ".join(chosen), top))] if chosen else []


def stems(query):
    """{stem: a word of the query that has it}, by FTS5's own tokenizer. It stems what it searches
    for, so it must not get a stem: databases, databas, databa."""
    with closing(sqlite3.connect(":memory:")) as db:
        for name, kind, tokenize in (("a", "row", WORDS), ("b", "instance", f"porter {WORDS}")):
            db.execute(f"CREATE VIRTUAL TABLE {name} USING fts5(text, tokenize='{tokenize}')")
            db.execute(f"CREATE VIRTUAL TABLE {name}_terms USING fts5vocab({name}, {kind})")
        db.execute("INSERT INTO a VALUES (?)", (query.encode("utf-8", "replace").decode(),))
        words = [word for word, in db.execute("SELECT term FROM a_terms")]
        db.executemany("INSERT INTO b(rowid, text) VALUES (?, ?)", enumerate(words))
        return {stem: words[n] for n, stem in db.execute("SELECT doc, term FROM b_terms")}


def add(db, first, passages):
    db.executemany("INSERT INTO passages(rowid, text) VALUES (?, ?)", (
        (first + n, f"{p['title']} {p.get('field', '')} {p['text']}")
        for n, p in enumerate(passages)))


def finish(db):
    db.execute("INSERT INTO passages(passages) VALUES ('optimize')")
    db.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab(main, passages, row)")
    db.execute("INSERT OR REPLACE INTO terms SELECT term, doc FROM vocabulary")


def sidecar(c):
    """FILE.fts5, made where it is missing, torn or of another FILE: this thread's connection."""
    mine, path = c["connections"], f"{c['path']}.fts5"
    with c["lock"]:
        if c["index"] is None:
            key = dumps([digest(c), c["path"].stat().st_mtime_ns])
            if not is_whole(path, key):
                try:
                    build(c, path, key)
                except (OSError, sqlite3.Error) as error:
                    die(f"{path}: expected to build an index of {c['path'].name} there, found: "
                        f"{error}. Copy the file to a folder that can be written")
            c["index"] = path
    mine.sidecar = getattr(mine, "sidecar", None) or connect(path)
    return mine.sidecar


def is_whole(path, key):
    try:
        with closing(connect(path)) as db:
            return one(db, "SELECT key, whole FROM made_from") == (key, 1)
    except sqlite3.Error:
        return False


def build(c, path, key):
    """Aside, then renamed. Killed, it goes on where it was; a second process waits."""
    aside = f"{path}.tmp"
    with open(aside, "ab") as f:
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX)
        except ImportError:  # Windows: one process at a time, please
            pass
        if is_whole(path, key):  # by the one that we waited for
            return Path(aside).unlink(missing_ok=True)
        if not os.path.exists(aside) or not os.path.samestat(os.stat(aside), os.fstat(f.fileno())):
            return build(c, path, key)  # it was renamed, but is not what we need
        print(f"building {path}, once", file=sys.stderr)
        with closing(begin(f, key, SIDECAR, [-2**63, 0])) as db:
            fill(c, db)
        os.replace(aside, path)


def begin(f, key, script, at):
    """A connection to f, a locked file in the making: as a killed process left it, if that made it
    from the same, else new, by `script`."""
    db = sqlite3.connect(f.name)
    try:
        if one(db, "SELECT key FROM made_from") == (key,):
            return db
    except sqlite3.Error:  # empty or torn
        pass
    db.close()
    f.truncate(0)  # SQLite drops a journal beside an empty file
    db = sqlite3.connect(f.name)
    db.executescript(script + MADE_FROM)
    db.execute("INSERT INTO made_from VALUES (?, ?, 0)", (key, dumps(at)))
    db.commit()
    return db


def mark(db, at, whole=False):
    """How far it is, in one transaction with what is there."""
    db.execute("UPDATE made_from SET at = ?, whole = ?", (dumps(at), whole))
    db.commit()


def fill(c, db):
    """Index the documents that are not in yet."""
    last, first = json.loads(*one(db, "SELECT at FROM made_from"))
    left = "FROM documents WHERE rowid > ?"
    rows = documents(c).execute(f"SELECT rowid, title, text {left} ORDER BY rowid", (last,))
    total = one(documents(c), f"SELECT count(*) {left}", last)[0]
    for n, (last, title, text) in enumerate(progress(rows, total=total, unit="page"), 1):
        if not isinstance(title, str) or not isinstance(text, str):
            die(f"{c['path']}: expected title and text as text, found other in row {last}")
        passages = cut(title, text)
        if passages:
            db.execute("INSERT INTO starts VALUES (?, ?)", (first, last))
        db.execute("INSERT OR REPLACE INTO loose VALUES (?, ?)", (plain_title(title), last))
        add(db, first, passages)
        first += len(passages)
        if n % 5000 == 0:
            mark(db, [last, first])
    finish(db)
    mark(db, [last, first], whole=True)
