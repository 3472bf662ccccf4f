"""06's report: what the page shows against what a test works out, in a browser where one is."""
import base64
import hashlib
import json
import math
import os
import random
import re
import select
import shutil
import subprocess
import sys
import unicodedata

import pytest
from conftest import ROOT, call, write_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --remote-debugging-pipe""".split()
START = ("import fcntl, os, sys; r, w = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in "
         "sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])")


class Browser:
    """Chromium over its debugging pipe: JSON that ends in NUL, into its fd 3, out of its fd 4."""

    def __init__(self, profile):
        (reads, self.to), (self.back, writes) = os.pipe(), os.pipe()
        words = [sys.executable, "-c", START, str(reads), str(writes), CHROMIUM, *FLAGS]
        self.process = subprocess.Popen([*words, f"--user-data-dir={profile}"],
                                        pass_fds=(reads, writes), stderr=subprocess.DEVNULL)
        list(map(os.close, (reads, writes)))
        self.rest, self.sent, self.events, self.session = b"", 0, [], None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def read(self):
        while b"\0" not in self.rest:
            assert select.select([self.back], [], [], 30)[0], "the browser is silent"
            data = os.read(self.back, 1 << 20)
            assert data, "the browser has gone"
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def __call__(self, method, **params):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.sent:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def js(self, code):
        done = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def key(self, key, code=0, text=""):
        for more in ({"type": "keyDown", "text": text}, {"type": "keyUp"}):
            self("Input.dispatchKeyEvent", key=key, windowsVirtualKeyCode=code, **more)

    def open(self, path, width=1300, scheme="light"):
        wanted = {"name": "prefers-color-scheme", "value": scheme}
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setEmulatedMedia", features=[wanted])
        self("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        self.js("new Promise(done => document.readyState === 'complete' ? done() : onload = done)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no chromium, chromium-browser or google-chrome here")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.process.terminate()
    found.process.wait()


# ---------------------------------------------------------------------------------------------
# Rows, and what a reader of them would expect

KINDS = ("border", "number", "region", "place", "other")
WORDS = """river coast border mineral harvest plateau island language republic parliament
    export Café Kraków northern rainfall capital council railway copper valley""".split()


def passages(rng, n=900):
    return [{"title": f"Land {rng.randrange(60)}", "field": rng.choice(WORDS).title(), "text":
             f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randrange(6, 250))), "found": "title"}
            for i in range(n)]


def made(seed, odds, prompts=25, samples=4):
    """Rows of 03 as long as real ones: spans count characters, an emoji is one of them."""
    rng, numbers = random.Random(seed), iter(range(10 ** 6))
    pool = passages(random.Random(5))
    for p, k in [(p, k) for p in range(prompts) for k in range(samples)]:
        text, sentences = rng.choice(["", "🌍 ", "\n"]), []
        for _ in range(rng.randrange(0, 7)):
            said = f"Land{p} has 𝒳 {' '.join(rng.choices(WORDS, k=rng.randrange(4, 22)))}."
            some = [{"text": f"Land{p} has {rng.choice(WORDS)} number {next(numbers)}",
                     "label": rng.choices(["S", "NS", "IR", None], odds)[0],
                     "kind": rng.choice(KINDS), "evidence": rng.sample(pool, rng.randrange(4)),
                     "repeats": rng.random() < .05} for _ in range(rng.randrange(4))]
            sentences.append({"text": said, "start": len(text), "end": len(text) + len(said),
                              "facts": some})
            text += said + rng.choice([" ", "\n\n", " 🌍🌍 "])
        yield {"id": f"p{p}/{k}", "prompt_id": f"p{p}", "topic": f"Land{p}", "response": text,
               "prompt": f"In three sentences, state facts about Land{p}.", "finish": "stop",
               "abstained": False, "sentences": sentences}


def facts_of(row):
    return [fact for sentence in row["sentences"] for fact in sentence["facts"]]


def f1(row, k=5):
    labels = [fact["label"] for fact in facts_of(row) if not fact["repeats"]]
    s, ns = labels.count("S"), labels.count("NS")
    if labels.count(None) > len(labels) / 5:
        return None
    return 2 / ((s + ns) / s + 1 / min(s / k, 1)) if s else 0


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def by_prompt(side):
    return {p: mean(f1(row) for row in side if row["prompt_id"] == p)
            for p in dict.fromkeys(row["prompt_id"] for row in side)}


def gains(sides):
    """{prompt: mean F1 of the tuned side, less the base's}"""
    of = list(map(by_prompt, sides))
    return {p: None if None in (of[0][p], of[1][p]) else of[1][p] - of[0][p] for p in of[0]}


def plain(text):
    return "".join(c for c in unicodedata.normalize("NFD", text)
                   if unicodedata.category(c)[0] != "M").lower()


def page(folder, show=25, **sides):
    files = [f"{name}={write_rows(folder / f'{i}.jsonl', rows)}"
             for i, (name, rows) in enumerate(sides.items())]
    out = folder / "report.html"
    done = call("06_eval.py", "compare", *files, "--k", 5, "--show", show, "--report", out)
    assert done.returncode == 0, done.stderr
    return out


def data_of(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('type="application/json">')[1].split("</script>")[0])


@pytest.fixture(scope="module")
def sides():
    base, tuned = list(made(1, (2, 7, 1, .4))), list(made(2, (5, 5, 1, .4)))
    next(facts_of(row) for row in base if row["prompt_id"] == "p1" and facts_of(row))[0] |= {
        "repeats": True, "evidence": passages(random.Random(3), 3)}
    prompts = [[row for row in tuned if row["prompt_id"] == f"p{p}"] for p in range(5, 25)]
    for row in next(some for some in prompts if all(map(facts_of, some))):
        for fact in facts_of(row):
            fact |= {"label": None, "repeats": False}  # a prompt without a difference
    return base, tuned


@pytest.fixture(scope="module")
def path(sides, tmp_path_factory):
    return page(tmp_path_factory.mktemp("page"), base=sides[0], tuned=sides[1])


BAD = ("<script>document.bad = 1</script>", "<img src=x onerror='document.bad = 1'>",
       "</script><script>document.bad = 1</script>", "<!--<script>", "\u2028 \u2029 \\u003c &lt;",
       "\"'><svg onload=document.bad=1>")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Each text of a row is an attack; three sets, one with a name that objects trip over."""
    said = " ".join(BAD)
    evidence = [{"title": BAD[0], "field": BAD[1], "text": said, "found": BAD[2]}]
    fact = {"text": said, "label": "S", "kind": BAD[5], "evidence": evidence}
    row = {"id": BAD[3], "prompt_id": BAD[2], "topic": BAD[1], "prompt": said, "response": said,
           "finish": "stop", "sentences": [{"start": 0, "end": len(BAD[0]), "facts": [fact]}]}
    chat = {**row, "prompt": [{"role": "user", "content": BAD[0]}, {"role": "assistant"}, 5]}
    return page(tmp_path_factory.mktemp("bad"), **{"base": [row], BAD[0].replace("=", ""): [chat],
                                                   "__proto__": [row]})


# ---------------------------------------------------------------------------------------------
# The file

def test_template_is_small_and_loads_nothing():
    text = (ROOT / "data/report.html").read_text(encoding="utf-8")
    assert len(text.encode()) <= 30_000
    for word in ("http:", "https:", "//cdn", "url(", "@import", " src=", "<link", "fetch(",
                 "XMLHttpRequest", "import(", "innerHTML", "outerHTML", "insertAdjacentHTML",
                 "document.write", "eval(", "Function("):
        assert word not in text, word
    assert '<html lang="en">' in text and "<title>" in text and "default-src 'none'" in text


def test_only_its_own_code_may_run(path):
    text = path.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed.pop("default-src") == "'none'"
    for tag in ("style", "script"):
        code, = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        code = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert allowed.pop(f"{tag}-src") == f"'sha256-{code}'"
    assert set(allowed.values()) == {"'none'"}


def test_data_cannot_leave_its_block(hostile):
    text, template = (path.read_text(encoding="utf-8") for path in (hostile, ROOT / "data"
                                                                    / "report.html"))
    assert text.count("<") == template.count("<")
    assert not {"\u2028", "\u2029"} & set(text)
    data = data_of(hostile)
    assert data["names"] == ["base", "base best-of-1", BAD[0].replace("=", ""), "__proto__"]
    one, said = data["prompts"][0], " ".join(BAD)
    assert (one["id"], one["topic"], one["prompt"]) == (BAD[2], BAD[1], said)
    assert one["sides"][3][0]["text"] == said
    assert one["sides"][3][0]["sentences"] == [[0, len(BAD[0]), [[said, "S", BAD[5], [0], False]]]]
    assert data["passages"] == [[BAD[0], BAD[1], said]]


def test_passages_are_kept_once_and_cut(tmp_path):
    rows = list(made(1, (1, 1, 0, 0), prompts=2))
    long = [{"title": "A", "field": "B", "text": "x" * n} for n in (1000, 1001, 5000)]
    for i, fact in enumerate(fact for row in rows for fact in facts_of(row)):
        fact["evidence"] = [long[i % 3], {"title": "A"}]
    data = data_of(page(tmp_path, base=rows, tuned=rows))
    assert sorted(data["passages"]) == sorted([["A", "", ""], ["A", "B", "x" * 1000],
                                               ["A", "B", "x" * 1000 + "…"]])
    seen = [[data["passages"][n][2] for n in fact[3]] for prompt in data["prompts"]
            for said in prompt["sides"][0] for *_, some in said["sentences"] for fact in some]
    assert seen == [["x" * 1000 + "…" * (i % 3 > 0), ""] for i in range(len(seen))] and seen


def test_200_responses_are_light(path, sides):
    assert sum(map(len, sides)) == 200 and path.stat().st_size <= 5_000_000
    real = {(e["title"], e["field"], e["text"][:1000]) for side in sides for row in side
            for fact in facts_of(row) for e in fact["evidence"]}
    assert len(data_of(path)["passages"]) == len(real)


def test_prompts_are_spread_over_those_of_all(tmp_path):
    base, tuned = list(made(1, (1, 1, 0, 0), 12, 2)), list(made(2, (1, 1, 0, 0), 12, 3))
    tuned = [row for row in reversed(tuned) if row["prompt_id"] not in ("p1", "p4")]
    data = data_of(page(tmp_path, show=3, base=base, tuned=tuned))
    assert [prompt["id"] for prompt in data["prompts"]] == ["p0", "p5", "p8"]  # of 0 2 3 5 6 7 8 ..
    assert [len(prompt["sides"][2]) for prompt in data["prompts"]] == [3, 3, 3]
    data = data_of(page(tmp_path, show=99, base=base, tuned=tuned))
    assert len(data["prompts"]) == 10


def test_numbers_are_those_of_compare(path, tmp_path):
    files = [f"{name}={path.parent / file}" for name, file in (("base", "0.jsonl"),
                                                               ("tuned", "1.jsonl"))]
    done = call("06_eval.py", "compare", *files, "--k", 5, "--out-json", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    found, data = json.loads((tmp_path / "c.json").read_text()), data_of(path)
    assert dict(zip(data["names"], data["rows"])) == found["rows"]
    assert data["verdict"] == found["verdict"]


# ---------------------------------------------------------------------------------------------
# The page

SEEN = """[...document.querySelectorAll('.prompt')].filter(p => p.checkVisibility()).map(p =>
    [p.querySelector('h2').textContent, [...p.querySelectorAll('.side')].map(side =>
    [...side.querySelectorAll('.response')].filter(r => r.checkVisibility()).map(r =>
    r.querySelector('.text').cloneNode(true)).map(t => {
      t.querySelectorAll('.mark').forEach(m => m.remove());
      return t.textContent; }))])"""


def quiet(browser):
    """The page has said nothing and asked for nothing but itself."""
    browser.js("0")
    loud = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event for event in browser.events if event["method"] in loud] == []
    asked = [event["params"]["request"]["url"] for event in browser.events
             if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.endswith("/report.html")] == []


def choose(browser, **fields):
    """Set fields by id; buttons of labels and "most" are pressed as given."""
    for name, value in fields.items():
        if name in ("labels", "most"):
            browser.js(f"document.querySelectorAll('#most#{name}, #{name} button').forEach((b, i)"
                       f" => (b.ariaPressed === 'true') !== {json.dumps(value)}.includes(i) "
                       "&& b.click())")
        else:
            browser.js(f"document.getElementById('{name}').value = {json.dumps(value)}; "
                       f"document.getElementById('{name}').dispatchEvent(new Event('input'))")


def fitting(row, labels=(), kind="", **_):
    return [fact for fact in facts_of(row) if (fact["label"] in labels or not labels)
            and kind in ("", fact["kind"])]


def expected(sides, words="", labels=(), kind="", most=False):
    """[(title, rows of each side)] that stay, worked out apart from the page."""
    change, found = gains(sides), []
    size = sorted((abs(gain or 0) for gain in change.values()), reverse=True)
    for prompt, gain in change.items():
        if most and abs(gain or 0) < size[math.ceil(len(size) / 4) - 1]:
            continue
        both = []
        for side in sides:
            both.append([])
            for row in (row for row in side if row["prompt_id"] == prompt):
                texts = [row["prompt"], prompt, row["topic"]], [row["response"]]
                texts = sum(texts, [fact["text"] for fact in facts_of(row)])
                if any(plain(words) in plain(text) for text in texts) and (
                        fitting(row, labels, kind) or not (labels or kind)):
                    both[-1].append(row)
        if any(both):
            found.append((prompt.replace("p", "Land"), both))
    return found


def texts_of(wanted):
    return [[name, [[row["response"] for row in side] for side in both]] for name, both in wanted]


def test_two_hundred_responses_as_they_are(browser, path, sides):
    times = []
    for _ in range(3):  # the machine may be busy
        browser.open(path)
        times.append(browser.js("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert 0 < min(times) < 2000
    assert browser.js(SEEN) == texts_of(expected(sides))
    quiet(browser)


def test_head(browser, path, sides):
    browser.open(path)
    base, tuned = (f"{100 * mean(by_prompt(side).values()):.1f} %" for side in sides)
    cells = browser.js("[...document.querySelectorAll('#numbers tr')].map(tr => "
                       "[...tr.querySelectorAll('th, b')].map(node => node.textContent))")
    assert cells[0] == ["F1@5", base, tuned]
    words = (mean(len(row["response"].split()) for row in side) for side in sides)
    assert cells[4] == ["words", *(f"{n:.1f}" for n in words)]
    lead = browser.js("document.querySelector('#lead').textContent")
    change = 100 * mean(gains(sides).values())
    assert lead.startswith(f"F1@5 is {tuned} for tuned, {base} for base. "
                           f"Against base: {change:+.1f} points [")
    assert lead.endswith("].") and "Sharpening is not ruled out" in browser.js(
        "document.querySelector('#notes').textContent")
    size = browser.js("[...document.querySelectorAll('#top small')].map(node => node.textContent)")
    assert size == ["25 prompts", "100 responses"] * 2


def test_nothing_that_is_planted_runs(browser, hostile):
    browser.open(hostile)
    browser.js("document.querySelector('button.mark').click()")
    assert browser.js("document.bad") is None
    assert browser.js("document.querySelectorAll('script').length") == 2
    assert browser.js("document.querySelectorAll('img, svg').length") == 0
    said = " ".join(BAD)
    assert browser.js("document.querySelector('.claim').textContent") == said
    assert browser.js("document.querySelector('blockquote').textContent") == (
        f"{BAD[0]} › {BAD[1]}: {said}")
    assert browser.js("document.querySelector('.ask').textContent") == said
    heading = "document.querySelector('#title').textContent"
    assert browser.js(heading) == BAD[0].replace("=", "") + " beside base"
    browser.js("document.querySelector('#right').value = 3; "
               "document.querySelector('#right').dispatchEvent(new Event('change'))")
    assert browser.js(heading) == "__proto__ beside base"
    assert browser.js("document.querySelectorAll('.claim, .text').length") == 2
    quiet(browser)


def test_sentences_are_marked_by_their_facts(browser, path, sides):
    browser.open(path)
    wanted = []
    for prompt in dict.fromkeys(row["prompt_id"] for row in sides[0]):
        for row in (row for side in sides for row in side if row["prompt_id"] == prompt):
            for sentence in row["sentences"]:
                labels = [f["label"] for f in sentence["facts"] if not f["repeats"]]
                s, ns = labels.count("S"), labels.count("NS")
                name = {(1, 1): "mixed", (1, 0): "s", (0, 1): "ns", (0, 0): "none"}[s > 0, ns > 0]
                sign = {"mixed": "±", "s": "✓", "ns": "✗", "none": "○"}[name]
                sign += f"\u2009{s}/{s + ns}" if s + ns else ""
                wanted.append([sentence["text"], f"sentence {name}",
                               sign if sentence["facts"] else None])
    assert browser.js("""[...document.querySelectorAll('.sentence')].map(node => [
        [...node.querySelectorAll('.said')].map(part => part.textContent).join(''),
        node.className, node.querySelector('.mark')?.textContent ?? null])""") == wanted
    lines = browser.js("""['s', 'mixed', 'ns', 'none'].map(name => getComputedStyle(
        document.querySelector(`.sentence.${name} .said`)).textDecorationStyle)""")
    assert len(set(lines)) == 4  # not by colour alone


@pytest.mark.parametrize("fields, same", [
    ({"labels": [0]}, {"labels": ["S"]}), ({"labels": [1, 2]}, {"labels": ["NS", "IR"]}),
    ({"labels": [3]}, {"labels": [None]}), ({"kind": "border"}, {"kind": "border"}),
    ({"labels": [0], "kind": "number"}, {"labels": ["S"], "kind": "number"}),
    ({"search": "  KRAKOW harvest"}, {"words": "krakow harvest"}),
    ({"search": "about land7."}, {"words": "about land7."}), ({"search": "cafe\u0301"},
     {"words": "café"}), ({"search": "number 17"}, {"words": "number 17"}),
    ({"most": [0]}, {"most": True}), ({"search": "nowhere at all"}, {"words": "nowhere at all"}),
    ({"most": [0], "labels": [0], "search": "plateau river"},
     {"most": True, "labels": ["S"], "words": "plateau river"})])
def test_filters_hide_what_they_must(browser, path, sides, fields, same):
    if browser.js("location.href") != path.as_uri():
        browser.open(path)
    choose(browser, **fields)
    wanted = expected(sides, **same)
    assert browser.js(SEEN) == texts_of(wanted)
    listed = browser.js("[...document.querySelectorAll('#list li')].filter(li => "
                        "li.checkVisibility()).map(li => li.querySelector('span').textContent)")
    assert listed == [name for name, _ in wanted]
    count = browser.js("document.querySelector('#count').textContent")
    rows = [row for _, both in wanted for side in both for row in side]
    said = f"{len(wanted)} of 25 prompts, {len(rows)} of 200 responses"
    if same.keys() & {"labels", "kind"}:
        said += f", {sum(len(fitting(row, **same)) for row in rows)} facts"
        lit = sum(bool(fitting({"sentences": [sentence]}, **same))
                  for row in rows for sentence in row["sentences"])
        assert lit == browser.js("[...document.querySelectorAll('.sentence:not(.dim)')].filter("
                                 "node => node.checkVisibility()).length")
    assert count == said
    choose(browser, search="", kind="", labels=[], most=[])
    assert browser.js(SEEN) == texts_of(expected(sides))
    quiet(browser)


def test_what_is_searched_for_is_marked(browser, path, sides):
    browser.open(path)
    choose(browser, search="HARVEST")
    times = sum(row["response"].count("harvest") for side in sides for row in side)
    assert browser.js("CSS.highlights.get('found').size") == times > 9


@pytest.mark.parametrize("value, sign", [("-1", -1), ("1", 1)])
def test_largest_gains_and_losses_come_first(browser, path, sides, value, sign):
    browser.open(path)
    choose(browser, sort=value)
    change = gains(sides)
    wanted = sorted(change, key=lambda p: (change[p] is None, sign * (change[p] or 0)))
    assert [name for name, _ in browser.js(SEEN)] == [p.replace("p", "Land") for p in wanted]
    said = browser.js("[...document.querySelectorAll('#list li')].map(li => "
                      "li.querySelector('span:last-child').textContent)")
    assert said == ["–" if change[p] is None else f"{100 * change[p]:+.1f}".replace("-", "\u2212")
                    for p in wanted]
    assert said[-1] == "–" and said.count("–") == 1


def test_by_keyboard(browser, path, sides):
    """j to the second prompt, Tab to its first sentence with facts, Enter, Escape; then / and k."""
    browser.open(path)
    for key in ("j", "ArrowRight", "ArrowRight", "k"):
        browser.key(key)
    focus = "document.activeElement.closest('.prompt')?.querySelector('h2').textContent"
    assert browser.js(focus) == "Land1" and browser.js("document.activeElement.tagName") == "H2"
    browser.key("Tab", 9)
    row = next(row for row in sides[0] if row["prompt_id"] == "p1" and facts_of(row))
    facts = next(s["facts"] for s in row["sentences"] if s["facts"])
    assert browser.js("document.activeElement.className") == "mark"
    browser.key("Enter", 13, "\r")
    names = {"S": "✓ supported", "NS": "✗ not supported", "IR": "∅ irrelevant", None: "○ unjudged"}
    assert browser.js("""[...document.querySelectorAll('#card li')].map(li => [
        '.label', 'small', '.claim'].map(name => li.querySelector(name).textContent).concat(
        [...li.querySelectorAll('blockquote')].map(quote => quote.textContent)))""") == [
        [names[fact["label"]], fact["kind"] + ", said before" * fact["repeats"], fact["text"], *(
            f"{e['title']} › {e['field']}: {e['text'][:1000]}{'…' * (len(e['text']) > 1000)}"
            for e in fact["evidence"])] for fact in facts]
    expanded = "document.querySelectorAll('[aria-expanded=true]').length"
    assert browser.js(expanded) == 1
    assert browser.js("document.querySelector('#card').contains(document.activeElement)")
    browser.key("Escape", 27)
    assert browser.js(expanded) == 0 and browser.js("document.querySelector('#card')") is None
    assert browser.js("document.activeElement.className") == "mark"
    browser.key("/")
    browser.key("j", 74, "j")
    assert browser.js("document.activeElement.value") == "j"  # typed, not obeyed
    browser.key("Escape", 27)
    assert browser.js("document.querySelector('#search').value") == ""
    quiet(browser)


def test_by_mouse(browser, path):
    """A look while the mouse is there; a click keeps the card, a click elsewhere shuts it."""
    browser.open(path)
    at = browser.js("""(() => { const node = document.querySelector('.sentence:has(.mark)');
        node.scrollIntoView({block: 'center'});
        const box = node.querySelector('.mark').getBoundingClientRect();
        return {x: box.x + box.width / 2, y: box.y + box.height / 2}; })()""")

    def mouse(kind, x, y):
        browser("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        browser.js("new Promise(done => setTimeout(done, 400))")
        return browser.js("document.querySelector('#card')?.className ?? null")

    high = browser.js("document.documentElement.scrollHeight")
    assert mouse("mouseMoved", **at) in ("s", "mixed", "ns", "none")
    assert browser.js("document.documentElement.scrollHeight") == high  # no jump
    assert mouse("mouseMoved", 5, at["y"]) is None
    mouse("mousePressed", **at)
    assert mouse("mouseReleased", **at).endswith(" pinned")
    assert mouse("mouseMoved", 5, at["y"]).endswith(" pinned")
    assert mouse("mousePressed", 5, at["y"]) is None


COLOURS = """[...document.querySelectorAll('body *')].filter(node => node.checkVisibility() &&
    [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())).map(node => {
      let back = node;
      while (/rgba\\(.*, 0\\)/.test(getComputedStyle(back).backgroundColor)) back = back.parentNode;
      return [getComputedStyle(node).color, getComputedStyle(back).backgroundColor,
              `${node.tagName} ${node.className}`]; })"""


def luminance(colour):
    parts = [int(part) / 255 for part in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)",
                                                      colour).groups()]
    linear = [c / 12.92 if c <= .03928 else ((c + .055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((.2126, .7152, .0722), linear))


@pytest.mark.parametrize("scheme", ["light", "dark", "switched to dark"])
def test_contrast(browser, path, scheme):
    browser.open(path, scheme="dark" if scheme == "dark" else "light")
    if scheme == "switched to dark":
        browser.js("document.querySelector('#theme').click()")
    browser.js("document.querySelector('.sentence.mixed .mark').click()")
    browser.js("document.querySelectorAll('details').forEach(more => more.open = true)")
    found = browser.js(COLOURS)
    assert {name.split()[-1] for *_, name in found} >= {"said", "mark", "label", "claim", "soft"}
    for text, back, name in {tuple(item) for item in found}:
        low, high = sorted((luminance(text), luminance(back)))
        assert (high + .05) / (low + .05) >= 4.5, (name, text, back)
    paper = luminance(browser.js("getComputedStyle(document.body).backgroundColor"))
    assert paper < .05 if "dark" in scheme else paper > .8


@pytest.mark.parametrize("width, stacked", [(400, True), (1300, False)])
def test_width(browser, path, width, stacked):
    browser.open(path, width)
    assert browser.js("document.documentElement.scrollWidth") <= width
    left = browser.js("[...document.querySelector('.sides').children].map(side => side.offsetLeft)")
    assert (left[0] == left[1]) == stacked


def test_factscore_files_show_facts_as_a_list(browser, tmp_path):
    facts = [{"text": "She was born in 1900.", "label": "S"}, {"text": "She sang.", "label": "NS"}]
    row = {"id": "ann", "input": "Tell me a bio of Ann.", "topic": "Ann", "output": "Ann sang.",
           "annotations": [{"text": "Ann sang.", "human-atomic-facts": facts}]}
    path = page(tmp_path, base=[row], tuned=[row, {**row, "id": "bo", "annotations": None}])
    browser.open(path)
    assert browser.js("""[...document.querySelectorAll('.response:has(.facts)')].map(node =>
        [...node.querySelectorAll('.text, .label, .claim')].map(part => part.textContent))""") == [
        [row["output"], "✓ supported", facts[0]["text"], "✗ not supported", facts[1]["text"]]] * 2
    quiet(browser)
