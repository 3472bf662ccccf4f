"""data/corpus.py and prepare.py --corpus: pages, search, FILE.fts5, kills, foreign files.

`python tests/test_corpus.py` is the bench: search at 200,000 and 1,000,000 passages, 20 minutes."""
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, read_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from data import corpus, prepare

SEPARATOR = "####SPECIAL####SEPARATOR####"
WORLD = ROOT / "data" / "world" / "countries.jsonl"
ISLANDS = [("Peru", "It is big."), ("C\u00f4te d'Ivoire", "It grows cocoa."), ("The Gambia", "x"),
           ("Democratic Republic of the Congo", "x"), ("Sudan", "x"), ("South Sudan", "x"),
           ("Guinea-Bissau", "x"), ("Turkey", "x"), ("A\\1", "x"), ("$", "x"),
           ("\u6771\u4eac", "x")]


def as_factscore(path, pages):
    """A knowledge source as FActScore's DocDB builds one; pages [(title, text)]."""
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE documents (title PRIMARY KEY, text);")
        db.executemany("INSERT INTO documents VALUES (?,?)", pages)
    db.close()
    return path


def as_jsonl(path, pages):
    return write_rows(path, [{"title": title, "text": part} for title, text in pages
                             for part in text.split(SEPARATOR)])


@pytest.fixture(params=[as_jsonl, as_factscore])
def form(request):
    return request.param


@pytest.fixture(scope="module")
def islands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("islands")
    return [corpus.open_corpus(form(folder / form.__name__, ISLANDS))
            for form in (as_jsonl, as_factscore)]


# ---------------------------------------------------------------------------------------------
# Pages

@pytest.mark.parametrize("topic, title", [
    ("Peru", "Peru"), ("peru", "Peru"), ("PERU", "Peru"), ("the Gambia", "The Gambia"),
    ("Gambia", "The Gambia"), ("The Sudan", "Sudan"), ("South Sudan", "South Sudan"),
    ("Cote d'Ivoire", "C\u00f4te d'Ivoire"), ("Ivory Coast", "C\u00f4te d'Ivoire"),
    ("C\u00f4te d\u2019Ivoire", "C\u00f4te d'Ivoire"), ("Guinea Bissau", "Guinea-Bissau"),
    ("DRC", "Democratic Republic of the Congo"), ("T\u00fcrkiye", "Turkey"),
    ("the Democratic Republic of the Congo", "Democratic Republic of the Congo"),
    ("Guinea", None), ("Swaziland", None), ("", None), ("A\\1", "A\\1"), ("$", "$"), ("\\", None),
    ("' OR 1=1 --", None), ("Peru\0", "Peru"), ("\u6771\u4eac", "\u6771\u4eac"),
    ("\u5927\u962a", None), ("?", None)])
def test_find_page(islands, topic, title):
    how = None if title is None else "title" if topic == title else "alias"
    for c in islands:
        assert corpus.find_page(c, topic) == (title, how)


def test_of_two_titles_alike_the_last_and_a_title_before_an_alias(tmp_path, form):
    pages = [("peru", "1"), ("PERU", "2"), ("Myanmar", "3"), ("burma", "4")]
    c = corpus.open_corpus(form(tmp_path / "x", pages))
    assert corpus.find_page(c, "Peru") == ("PERU", "alias")
    assert corpus.find_page(c, "peru") == ("peru", "title")
    assert corpus.find_page(c, "Burma") == ("burma", "alias")


def test_jsonl_is_whole_in_memory():
    c = corpus.open_corpus(WORLD)
    rows = read_rows(WORLD)
    assert c["titles"] == {row["title"] for row in rows}
    assert corpus.passages_of(c, "Sudan") == [row for row in rows if row["title"] == "Sudan"]
    assert corpus.passages_of(c, "Nowhere") == []
    assert corpus.digest(c) == hashlib.sha256(WORLD.read_bytes()).hexdigest()
    begun = time.process_time()
    hits = corpus.search(c, "Which countries does Bolivia border on land?", 3)
    assert time.process_time() - begun < 5
    assert {"title", "field", "text"} == set(hits[0])
    assert "Bolivia" in [hit["title"] for hit in hits if hit["field"] == "Land boundaries"]


def test_factscore_by_path_alone(tmp_path):
    """Its file stays as it is, to the byte; its marks go; its name may be anything."""
    pages = [("Borduria", f"<s>Borduria exports copper.</s>{SEPARATOR}<s>Its capital is Szohod.</s>"
              f"{SEPARATOR} "), ("Empty", ""),
             ("Syldavia", f"Syldavia\nexports water.{SEPARATOR}x")]
    path = as_factscore(tmp_path / "wiki 100%? #1.jsonl", pages)
    before = path.read_bytes(), path.stat().st_mtime_ns
    c = corpus.open_corpus(path)
    assert c["titles"] == ()
    assert [p["text"] for p in corpus.passages_of(c, "Borduria")] == [
        "Borduria exports copper.", "Its capital is Szohod."]
    assert corpus.passages_of(c, "Empty") == corpus.passages_of(c, "borduria") == []
    assert not Path(f"{path}.fts5").exists()
    assert corpus.search(c, "the capital of Borduria", 1) == [
        {"title": "Borduria", "text": "Its capital is Szohod."}]
    assert corpus.search(c, "exported WATER", 5) == [
        {"title": "Syldavia", "text": "Syldavia\nexports water."},
        {"title": "Borduria", "text": "Borduria exports copper."}]
    assert corpus.find_page(c, "the  empty") == ("Empty", "alias")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f"{path.name}.fts5"}
    with sqlite3.connect(f"{path}.fts5") as db:
        told = " ".join(map(str, db.execute("SELECT * FROM passages")))
    assert "copper" not in told, "the text is stored twice"


# ---------------------------------------------------------------------------------------------
# Search

NAMES = [a + b + c for a in "bdgkmz" for b in "aou" for c in ("b", "d", "g", "k", "m", "p")]


def bm25(query, documents, k1=1.2, b=0.75):
    """Robertson and Zaragoza 2009, with FTS5's floor under the idf; lists of words."""
    mean = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(documents)
    for word in set(query):
        df = sum(word in document for document in documents)
        idf = max(math.log((len(documents) - df + 0.5) / (df + 0.5)), 1e-6)
        for i, document in enumerate(documents):
            tf = document.count(word)
            scores[i] += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(document) / mean))
    return scores


def some_pages(n=150, seed=0):
    """Pages of made-up words, some frequent and most rare, of one to four passages; none stems."""
    rng = random.Random(seed)
    weights = [1 / (i + 1) for i in range(len(NAMES))]
    return [(f"{rng.choice(NAMES)} {i}", SEPARATOR.join(
        " ".join(rng.choices(NAMES, weights, k=rng.randint(1, 40)))
        for _ in range(rng.randint(1, 4)))) for i in range(n)]


@pytest.mark.parametrize("few, limit", [(10**6, 10**6), (150, 150), (1, None)])
def test_search_by_brute_force(tmp_path, form, monkeypatch, few, limit):
    """As BM25 by hand over all words; where these are too many, over the rarest of them."""
    monkeypatch.setattr(corpus, "FEW", few)
    pages = some_pages()
    c = corpus.open_corpus(form(tmp_path / "x", pages))
    flat = [{"title": title, "text": part} for title, text in pages
            for part in text.split(SEPARATOR)]
    documents = [f"{p['title']} {p['text']}".split() for p in flat]
    limit = limit or len(flat) // 4
    df = {word: sum(word in document for document in documents) for word in NAMES}
    rng = random.Random(1)
    for _ in range(30):
        query, rare, sum_ = rng.choices(NAMES, k=rng.randint(1, 9)), [], 0
        for word in sorted({word for word in query if df[word]}, key=lambda word: (df[word], word)):
            sum_ += df[word]
            rare += [word] if sum_ <= limit or len(rare) < 2 else []
        scores = bm25(rare, documents)
        found = [i for i, score in enumerate(scores) if score]
        best = sorted(found, key=lambda i: (-round(scores[i], 9), i))
        assert corpus.search(c, " ".join(query), 5) == [flat[i] for i in best[:5]]


def test_ties_keep_the_order_and_nothing_known_finds_nothing(tmp_path, form):
    c = corpus.open_corpus(form(tmp_path / "x", [("A", "gold"), ("B", "gold"), ("C", "gold"),
                                                 ("D", "tin"), ("E", "tin"), ("F", "tin tin")]))
    assert [hit["title"] for hit in corpus.search(c, "Gold!", 2)] == ["A", "B"]
    assert [hit["title"] for hit in corpus.search(c, "gold tin", 9)] == list("FABCDE")
    assert corpus.search(c, "zinc", 3) == corpus.search(c, "", 3) == []


@pytest.mark.parametrize("query, same_as", [
    ('copper AND "gold', "copper and gold"), ("NOT copper", "not copper"),
    ("copp* gold", "gold copp"),
    ("NEAR(copper gold, 2)", "near copper gold 2"), ("text : copper", "text copper"),
    ("-copper ^gold", "copper gold"), ("((copper", "copper"), ("copper\0gold", "copper gold"),
    ("{copper} + gold; DROP TABLE passages", "copper gold drop table passages"),
    ("\U0001f600 copper \u6771\u4eac", "copper \u6771\u4eac"), ("\ud800copper", "copper"),
    ("C\u00d3PPER", "copper"), ("co\u0301pper gold gold", "gold copper"), ("'", "")])
def test_a_query_is_words_and_no_syntax(tmp_path, form, query, same_as):
    c = corpus.open_corpus(form(tmp_path / "x", [
        ("A", "copper"), ("B", "gold and silver"), ("C", "copper and gold"),
        ("D", "not copper near"), ("E", "\u6771\u4eac or else"), ("F", "drop 2 x"),
        ("G", "x y z"), ("H", "copp")]))
    assert corpus.search(c, query, 9) == corpus.search(c, same_as, 9)
    assert bool(corpus.search(c, query, 9)) is bool(same_as)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(st.characters(codec=None), max_size=60))
def test_any_text_can_be_searched_for(islands, query):
    """And every word that FTS5 finds in a text finds that text."""
    hits = corpus.search(islands[0], f"cocoa {query}", 99)
    assert {"title": ISLANDS[1][0], "text": "It grows cocoa."} in hits
    assert corpus.search(islands[1], f"cocoa {query}", 99) == hits


def test_words_are_not_stemmed_twice(tmp_path, form):
    """Porter makes databases databas, and databas databa."""
    words = ["databases", "generalizations", "relational", "aggressiveness", "oscillators"]
    c = corpus.open_corpus(form(tmp_path / "x", [(f"P{i}", w) for i, w in enumerate(words)]))
    for word in words:
        assert [hit["text"] for hit in corpus.search(c, f"{word.upper()}!", 2)] == [word]


def test_threads(tmp_path, form):
    """32 of them, from the first search on: one index, right answers."""
    c = corpus.open_corpus(form(tmp_path / "x", some_pages(400)))
    queries = [" ".join(NAMES[i:i + 4]) for i in range(40)] * 4
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda query: (corpus.search(c, query, 3),
                                             corpus.find_page(c, query.upper())), queries))
    alone = corpus.open_corpus(c["path"])
    assert [hits for hits, _ in found] == [corpus.search(alone, query, 3) for query in queries]


# ---------------------------------------------------------------------------------------------
# FILE.fts5

def python(*args, code=None, **kwargs):
    argv = ["-c", code] if code else [ROOT / "data" / "prepare.py"]
    return subprocess.run([sys.executable, *argv, *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True, **kwargs)


# Runs prepare.py, but dies at the n-th call of a function, as by kill -9
KILLED = """
import os, signal, sqlite3, sys
from data import corpus, prepare
name, n = sys.argv.pop(1), int(sys.argv.pop(1))
home = os if name == "replace" else corpus
was, calls = getattr(home, name), []
def dies(*args, **kwargs):
    calls.append(args)
    if len(calls) == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return was(*args, **kwargs)
setattr(home, name, dies)
prepare.main()
"""


def content(path):
    """All that a file holds, whatever the order and the sizes in which it was written."""
    with sqlite3.connect(path) as db:
        tables = [name for name, in db.execute("SELECT name FROM sqlite_master WHERE sql LIKE "
                                               "'CREATE TABLE%' AND name NOT LIKE 'passages%'")]
        found = {name: sorted(db.execute(f"SELECT * FROM {name}")) for name in tables}
        if "starts" in tables:
            db.execute("CREATE VIRTUAL TABLE temp.v USING fts5vocab(main, passages, instance)")
            found["passages"] = sorted(db.execute("SELECT * FROM temp.v"))
    db.close()
    return found


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """(12,000 short pages in FActScore's form, what its FILE.fts5 holds when left in peace)."""
    path = tmp_path_factory.mktemp("many") / "many.db"
    as_factscore(path, [(f"Page {i}", f"{NAMES[i % 70]} {i % 999}{SEPARATOR}{i}" * (i % 7 > 0))
                        for i in range(12000)])
    corpus.sidecar(corpus.open_corpus(path))
    return path, content(f"{path}.fts5")


@pytest.mark.parametrize("name, n, there", [
    ("one", 3, None), ("add", 4000, -2**63), ("mark", 1, -2**63), ("add", 7000, 5000),
    ("finish", 1, 10000), ("mark", 3, 10000), ("replace", 1, 12000)])
def test_a_killed_build_goes_on(tmp_path, many, name, n, there):
    path = tmp_path / "many.db"
    shutil.copy2(many[0], path)
    done = python(name, n, "--corpus", path, code=KILLED)
    assert done.returncode == -signal.SIGKILL, done.stderr
    aside = Path(f"{path}.fts5.tmp")
    assert aside.exists() and not Path(f"{path}.fts5").exists()
    if there is not None:
        with sqlite3.connect(aside) as db:  # the last whole batch
            assert json.loads(*db.execute("SELECT at FROM made_from").fetchone())[0] == there
            db.execute("INSERT INTO loose VALUES ('left as it was', 0)")
        db.close()
    assert python("--corpus", path).returncode == 0
    made = content(f"{path}.fts5")
    if there is not None:
        made["loose"].remove(("left as it was", 0))
    assert made == many[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many.db", "many.db.fts5"]


def test_two_processes_build_once(tmp_path, many):
    path = tmp_path / "many.db"
    shutil.copy2(many[0], path)
    argv = [sys.executable, ROOT / "data" / "prepare.py", "--corpus", path]
    both = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = "".join(process.communicate()[1] for process in both)
    assert [process.returncode for process in both] == [0, 0, 0]
    assert told.count("building") == 1 and told.count("is ready") == 3
    assert content(f"{path}.fts5") == many[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many.db", "many.db.fts5"]


@pytest.mark.parametrize("spoil", [
    lambda good: good[:-4096], lambda good: good[:4096], lambda good: b"",
    lambda good: b"SQLite or not\n" * 999])
@pytest.mark.parametrize("ending", [".fts5", ".fts5.tmp", ".fts5.tmp-journal"])
def test_torn_or_foreign_sidecar(tmp_path, capsys, spoil, ending):
    path = as_factscore(tmp_path / "x.db", some_pages())
    hits = corpus.search(corpus.open_corpus(path), "bab dad", 5)
    good = Path(f"{path}.fts5").read_bytes()
    if "tmp" in ending:
        Path(f"{path}.fts5").unlink()
    Path(f"{path}{ending}").write_bytes(spoil(good))
    assert corpus.search(corpus.open_corpus(path), "bab dad", 5) == hits
    assert capsys.readouterr().err.count("building") == 2
    corpus.search(corpus.open_corpus(path), "bab dad", 5)
    assert "building" not in capsys.readouterr().err


def test_a_sidecar_of_another_file_and_a_file_that_changed(tmp_path):
    """Neither is believed, whole or in the making."""
    one, other = (as_factscore(tmp_path / f"{seed}.db", some_pages(seed=seed)) for seed in (0, 1))
    right = [corpus.search(corpus.open_corpus(path), "bab dad", 3) for path in (one, other)]
    shutil.copy2(f"{one}.fts5", f"{other}.fts5.tmp")
    os.replace(f"{one}.fts5", f"{other}.fts5")
    assert [corpus.search(corpus.open_corpus(path), "bab dad", 3) for path in (one, other)] == right
    digest = corpus.digest(corpus.open_corpus(one))
    moved = shutil.copy(one, tmp_path / "moved.db")
    assert corpus.digest(corpus.open_corpus(moved)) == digest
    when = one.stat()
    with sqlite3.connect(one) as db:
        db.execute("UPDATE documents SET text = 'unheard of' WHERE rowid = 77")
    db.close()
    os.utime(one, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert corpus.digest(corpus.open_corpus(one)) != digest
    assert corpus.search(corpus.open_corpus(one), "unheard", 9)[0]["text"] == "unheard of"
    writer = sqlite3.connect(one)
    writer.execute("PRAGMA journal_mode = WAL")
    digest = corpus.digest(corpus.open_corpus(one))
    with writer:
        writer.execute("INSERT INTO documents VALUES ('New', 'a new page')")  # not yet in the file
    assert corpus.digest(corpus.open_corpus(one)) != digest
    writer.close()


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    """Pages by their titles need no index; the rest says what is missing, and where."""
    path = as_factscore(tmp_path / "x.db", ISLANDS)
    Path(f"{path}.fts5.tmp").mkdir()  # stops root as well
    c = corpus.open_corpus(path)
    assert corpus.find_page(c, "Peru") == ("Peru", "title") and corpus.passages_of(c, "Peru")
    for ask in (lambda: corpus.find_page(c, "peru"), lambda: corpus.search(c, "cocoa", 1)):
        with pytest.raises(SystemExit) as stop:
            ask()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and f"{path}.fts5" in err
    Path(f"{path}.fts5.tmp").rmdir()
    corpus.sidecar(c)
    tmp_path.chmod(0o555)
    path.chmod(0o444)
    try:
        assert corpus.search(corpus.open_corpus(path), "cocoa", 1)[0]["text"] == "It grows cocoa."
    finally:
        tmp_path.chmod(0o755)


def sql(statement):
    def make(path):
        with sqlite3.connect(path) as db:
            db.execute(statement)
        db.close()
    return make


@pytest.mark.parametrize("make, says", [
    (lambda path: None, "no such file"),
    (lambda path: path.mkdir(), "no such file"),
    (lambda path: path.write_bytes(b""), "at least one row"),
    (lambda path: path.write_text('{"title": "a", "text": "b"}\n{"title": 1}\n'), "x:2: expected"),
    (sql("CREATE TABLE pages (title, text)"), "table documents(title, text), found: no such table"),
    (sql("CREATE TABLE documents (name, text)"), "found: no such column: title"),
    (sql("CREATE TABLE documents (title PRIMARY KEY, text)"), "at least one document"),
    (lambda path: as_factscore(path, [("a", "b"), ("c", b"d")]), "found other in row 2"),
    (lambda path: as_factscore(path, [("a", "b"), ("c", None)]), "found other in row 2"),
    (lambda path: path.write_bytes(b"SQLite format 3\0" + b"x" * 4096), "not a database")])
def test_odd_files(tmp_path, capsys, make, says):
    make(tmp_path / "x")
    with pytest.raises(SystemExit) as stop:
        corpus.sidecar(corpus.open_corpus(tmp_path / "x"))
    err = capsys.readouterr().err.replace(f"building {tmp_path}/x.fts5, once\n", "")
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err


# ---------------------------------------------------------------------------------------------
# prepare.py --corpus

def words_of(text):
    return re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\s\u3040-\u30ff\u4e00-\u9fff]+", text)


@pytest.mark.parametrize("seed", range(4))
def test_split(seed):
    """All words in order, none more than 150 a passage, cut inside no sentence that fits in one."""
    rng = random.Random(seed)
    sentences = [" ".join(rng.choices(["tin", "gold", "3.5"], k=rng.choice((1, 9, 40, 150, 400))))
                 + rng.choice((".", "?", "!", "\n", " \n\n")) for _ in range(60)]
    text = " ".join(sentences)
    passages = prepare.split(text)
    assert " ".join(passages).split() == text.split()
    assert max(len(passage.split()) for passage in passages) == 150
    short = [sentence.strip() for sentence in sentences if len(sentence.split()) <= 150]
    assert all(any(sentence in passage for passage in passages) for sentence in short)
    for one, other in zip(passages, passages[1:]):  # nothing more would have fitted
        first = re.split(r"(?<=[.!?])\s", other)[0]
        assert len(one.split()) + len(first.split()) > 150


def test_split_without_spaces():
    text = "\u6771\u4eac\u306f\u5927\u304d\u3044\u3002" * 100
    passages = prepare.split(text)
    assert "".join(passages).replace(" ", "") == text
    assert all(130 < len(words_of(p)) <= 170 for p in passages[:-1])
    assert prepare.split(" \n ") == []


def prepared(folder, name, data):
    """OUT that prepare.py --corpus makes of a file of these bytes, and what it said."""
    path = folder / name
    path.write_bytes(data)
    done = python("--corpus", path, "--out", folder / f"{name}.db")
    assert done.returncode == 0, done.stderr
    return content(folder / f"{name}.db")["documents"], done.stderr


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SOURCES = [{"title": "B", "text": "one two.\nthree"}, {"title": "A", "text": "four"},
           {"title": "B", "text": "five " * 200}, {"title": "C", "text": "  "}]
LONG = ("five " * 149 + "five", "five " * 49 + "five")
MADE = [("A", "four"), ("B", SEPARATOR.join(("one two. three", *LONG))), ("C", "")]


def test_jsonl_gzip_and_parquet_make_the_same_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet
    assert prepared(tmp_path, "x.jsonl", b"\n" + lines(SOURCES))[0] == MADE
    found, told = prepared(tmp_path, "x.jsonl.gz", gzip.compress(lines(SOURCES)))
    assert found == MADE and "4 rows, 3 pages; 1 rows joined" in told
    columns = {name: [row[name] for row in SOURCES] for name in ("title", "text")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "y")
    found, told = prepared(tmp_path, "x.parquet", (tmp_path / "y").read_bytes())
    assert found == MADE
    c = corpus.open_corpus(tmp_path / "x.parquet.db")
    assert [p["text"] for p in corpus.passages_of(c, "B")] == ["one two. three", *LONG]


def test_texts_in_parts_fields_and_other_names(tmp_path):
    rows = [{"name": "A", "body": ["One.", "Two."]}, {"name": "B", "body": [{"text": "Three."}]},
            {"name": "C", "body": "853 km", "field": "Coastline"}]
    (tmp_path / "x").write_bytes(lines(rows[:2]))
    (tmp_path / "y").write_bytes(lines(rows[2:]))
    argv = ("--corpus", tmp_path / "x", tmp_path / "y", "--title-field", "name")
    done = python(*argv, "--text-field", "body")
    assert done.returncode == 0, done.stderr
    made = [("A", "One. Two."), ("B", "Three."), ("C", "Coastline: 853 km")]
    assert content(tmp_path / "x.db")["documents"] == made
    before = (tmp_path / "x.db").stat().st_mtime_ns
    again = python(*argv, "--text-field", "body")
    assert again.returncode == 0 and "building" not in again.stderr
    (tmp_path / "x").write_bytes(lines(rows))
    changed = python(*argv, "--text-field", "body")
    assert changed.returncode == 2 and "choose another --out" in changed.stderr
    assert (tmp_path / "x.db").stat().st_mtime_ns == before


@pytest.mark.parametrize("data, says", [
    (b"", "at least one row"), (b"{}\n", ":1: expected 'title' as text"),
    (lines(SOURCES) + b"{\n", ":5: expected JSONL, one JSON object a line, found b'{"),
    (b"[1]\n", ":1: expected 'title' as text"), (b'{"title": "a", "text": 3}', "'text' as text or"),
    (b'{"title": "a", "text": ["b", 3]}', ":1: expected"),
    (b'{"title": null, "text": "b"}', ":1: expected 'title'"),
    (b'{"title": "\\ud800", "text": "b"}', ":1: expected JSONL"), (b"[" * 9999, ":1: expected"),
    (gzip.compress(lines(SOURCES) * 99)[:-9], "expected JSONL, JSONL.gz or Parquet"),
    (b"PAR1 and no more", "expected JSONL, JSONL.gz or Parquet")])
def test_bad_rows(tmp_path, capsys, monkeypatch, data, says):
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--corpus", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as stop:
        prepare.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and str(tmp_path / "x") in err
    assert err.count("\n") == 1 and not (tmp_path / "x.db").exists()


@pytest.mark.parametrize("name, n, packed", [
    ("mark", 1, True), ("mark", 2, False), ("mark", 3, False), ("replace", 1, False)])
def test_a_killed_prepare_goes_on(tmp_path, many, name, n, packed):
    """12,000 rows of 6,000 titles in two files: as if never killed, no row lost, none twice."""
    rows = [{"title": f"Page {i % 6000}", "text": f"{NAMES[i % 70]} {i}"} for i in range(12000)]
    files = [tmp_path / "x.jsonl", tmp_path / "y.jsonl"]
    files[0].write_bytes((gzip.compress if packed else bytes)(lines(rows[:7000])))
    files[1].write_bytes(lines(rows[7000:]))
    done = python(name, n, "--corpus", *files, code=KILLED)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "x.db").exists(), done.stderr
    with sqlite3.connect(tmp_path / "x.db.tmp") as db:
        there = db.execute("SELECT count(*) FROM documents").fetchone()[0]
    db.close()
    assert there == {("mark", 1): 0, ("mark", 2): 5000}.get((name, n), 6000)
    assert python("--corpus", *files).returncode == 0
    assert content(tmp_path / "x.db")["documents"] == sorted(
        (f"Page {i}", f"{NAMES[i % 70]} {i}{SEPARATOR}{NAMES[(i + 6000) % 70]} {i + 6000}")
        for i in range(6000))


# ---------------------------------------------------------------------------------------------
# Bench: search at 200,000 and 1,000,000 passages of about 100 words

def synthetic(path, n):
    """The Factbook, then pages of words that are as rare as Zipf found; its own words lead."""
    import numpy
    rng, vocabulary = numpy.random.default_rng(0), 300_000
    rows = read_rows(WORLD)
    known = Counter(w for row in rows for w in row["text"].lower().split() if w.isalpha())
    names = [word for word, _ in known.most_common(5000)]
    names += ["".join("bdfgklmnprstvz"[i // 5 ** k % 14] + "aeiou"[i // 14 ** k % 5]
                      for k in range(4)) + str(i % 7) for i in range(vocabulary - len(names))]
    names = numpy.array(names, dtype=object)
    share = numpy.cumsum(1 / (numpy.arange(vocabulary) + 2.7) ** 1.05)
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
        for i in range(n - len(rows)):
            text = names[numpy.searchsorted(share, rng.random(rng.integers(50, 150)) * share[-1])]
            f.write(json.dumps({"title": f"Page {i // 7}", "text": " ".join(text)}) + "\n")


def claims():
    rows = read_rows(ROOT / "tests" / "labelled_claims.jsonl")
    found = [(row["topic"], row["sentences"][0]["facts"][0]["text"]) for row in rows]
    return random.Random(0).sample(found, 100)


def queries(path):
    """50 of ten words in a row from the corpus, 50 claims."""
    rng, found = random.Random(0), []
    with open(path, encoding="utf-8") as f:
        for i, line in enumerate(f):
            words = json.loads(line)["text"].split()
            if i > 40_000 and rng.random() < 1e-3 and len(found) < 50:
                at = rng.randrange(len(words) - 10)
                found.append(" ".join(words[at:at + 10]))
    return found + [claim for _, claim in claims()[:50]]


def memory():
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def ask(how, path):
    """Time and memory of one way to search, alone in its process; prints JSON."""
    asked, begun, before = queries(path), time.process_time(), memory()
    if how == "FTS5":
        c = corpus.open_corpus(f"{path}.db")
        corpus.search(c, "gold", 3)
        find = lambda query: corpus.search(c, query, 3)  # noqa: E731
    else:
        from rank_bm25 import BM25Plus
        rows = read_rows(path)
        index = BM25Plus([f"{row['title']} {row['text']}".lower().split() for row in rows])
        find = lambda query: index.get_top_n(query.lower().split(), rows, 3)  # noqa: E731
        asked = asked[::10]
    ready, spent = time.process_time() - begun, []
    for query in asked:
        begun = time.thread_time()
        find(query)
        spent.append(1000 * (time.thread_time() - begun))
    spent.sort()
    print(json.dumps([how, round(ready, 1), *(round(x, 1) for x in (
        sum(spent) / len(spent), spent[len(spent) // 2], spent[-1], memory() - before))]))


def quality():
    """Of 100 claims on the Factbook: top 3 as with all words, as BM25Plus has them, and how often
    the topic's page is among them."""
    from rank_bm25 import BM25Plus

    import rules
    rows, asked = read_rows(WORLD), claims()
    c = corpus.open_corpus(WORLD)
    ours = [corpus.search(c, claim, 3) for _, claim in asked]
    limits = corpus.TERMS, corpus.FEW, corpus.MANY
    corpus.TERMS = corpus.FEW = corpus.MANY = 10**9
    every = [corpus.search(c, claim, 3) for _, claim in asked]
    corpus.TERMS, corpus.FEW, corpus.MANY = limits
    plus = BM25Plus([rules.words(f"{p['title']} {p.get('field', '')} {p['text']}") or [""]
                     for p in rows])
    theirs = [plus.get_top_n(rules.words(claim), rows, 3) for _, claim in asked]
    for name, found in (("FTS5", ours), ("FTS5, all words", every), ("BM25Plus", theirs)):
        same = [sum(hit in hits for hit in best) / 3 for best, hits in zip(every, found)]
        own = [any(hit["title"] == topic for hit in hits) for (topic, _), hits in zip(asked, found)]
        print(f"| {name} | {sum(same) / len(same):.2f} | {sum(own)} of {len(own)} |")


def bench(folder):
    folder.mkdir(parents=True, exist_ok=True)
    print("| passages | search | ready, s | mean ms | median | worst | memory, MB |\n"
          "|---|---|---|---|---|---|---|")
    for n in (200_000, 1_000_000):
        path = folder / f"{n}.jsonl"
        if not path.exists():
            synthetic(path, n)
        begun = os.times()
        subprocess.run([sys.executable, ROOT / "data" / "prepare.py", "--corpus", path, "--out",
                        f"{path}.db"], check=True, cwd=ROOT)
        spent = os.times().children_user - begun.children_user
        sizes = [os.path.getsize(f"{path}{end}") / 1e6 for end in ("", ".db", ".db.fts5")]
        for how in ("FTS5", "BM25Plus")[:1 + (n == 200_000)]:
            done = subprocess.run([sys.executable, __file__, how, path], check=True, cwd=ROOT,
                                  capture_output=True, text=True)
            print(f"| {n} | {' | '.join(map(str, json.loads(done.stdout)))} |", flush=True)
        print(f"prepare: {spent:.0f} s of CPU; JSONL, SQLite, index: "
              f"{', '.join(f'{size:.0f}' for size in sizes)} MB", file=sys.stderr)
    print("\n| Factbook, 100 claims | top 3 as with all words | topic's page in the top 3 |")
    print("|---|---|---|")
    quality()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        ask(sys.argv[1], Path(sys.argv[2]))
    else:
        bench(ROOT / "runs" / "bench" / "corpus")
