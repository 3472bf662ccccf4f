"""
Offline stand-ins for an LLM, no paper's idea. 02 uses sentences and facts, 03 read_page and check
(does a page of a reference work carry a claim?), normal forms; words: data/lexicon.json.
"""
import json
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

LEXICON = json.loads((Path(__file__).parent / "data" / "lexicon.json").read_text(encoding="utf-8"))


def either(words):
    return "(?:" + "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) + ")"


# ---------------------------------------------------------------------------------------------
# Sentences

SENTENCE_END = re.compile(r"[.!?\u2026\u3002]+[\"'\u201d\u2019)\]*]*(?=\s|$)")
LIST_MARKER = re.compile(r"\s*(?:[-*\u2022]|\(?\d{1,3}[.)]|[a-z][.)])\s+")


def ends_sentence(mark, before, rest):
    """Does the punctuation `mark` end a sentence, between `before` and the rest of the line?"""
    if not rest or mark[0] != ".":
        return not rest or not rest[0].islower()
    word = before.split()[-1].lstrip("(\"'\u201c").lower() if before.split() else ""
    initial = re.fullmatch(r"[a-z](\.[a-z])*", word)  # "J. K. Rowling", "U.S. dollars"
    return not (rest[0].islower() or initial or word in LEXICON["abbreviations"])


def sentences(text):
    """[(start, end)] of the sentences of `text`; a line break ends one; only blanks between."""
    spans = []
    for line in re.finditer(r"[^\r\n\u2028\u2029]+", text):
        start = line.start()
        marker = LIST_MARKER.match(line[0])
        for m in SENTENCE_END.finditer(text, start + (marker.end() if marker else 0), line.end()):
            if ends_sentence(m[0], text[start:m.start()], text[m.end():line.end()].lstrip()):
                spans.append((start, m.end()))
                start = m.end()
        spans.append((start, line.end()))
    solid = [(start, re.search(r"\S(?:.*\S)?", text[start:end])) for start, end in spans]
    return [(start + m.start(), start + m.end()) for start, m in solid if m]


# ---------------------------------------------------------------------------------------------
# Facts: a sentence becomes statements that stand alone

VERB, PASSIVE, ACTIVE, NOUN = (either(LEXICON[key]) + r"\b" for key in
                               ("finite_verbs", "passives", "participles", "country_nouns"))
DIRECTION = r"(?:(?:north|south)(?:[- ]?(?:east|west))?|east|west)"
ASIDE = rf"(?:to|on|in|along) (?:the|its) {DIRECTION}"
CAPITAL = r"[A-Z\u00c0-\u00de]"
NAME = rf"{CAPITAL}[\w'\u2019.-]*(?:(?: of(?: the)?| and)? (?:d')?{CAPITAL}[\w'\u2019.-]*)*"
BORDER = (r"\b(?:border(?:s|ed|ing)?(?: by| with| on)?|surrounded by|surrounding|flanked by"
          r"|bounded by|shar(?:es|ing) (?:its |a )?(?:\w+ )?borders? with|neighbou?rs)")
MEMBER = r"(?:an? )?(?:founding )?members? of "
LIST = re.compile(rf"(.*?(?:{BORDER}|\b(?:{'|'.join(LEXICON['lists'])})))\s+(.+)")
LEAD_IN = re.compile(rf"(?i)\A(?:(?:{either(LEXICON['lead_ins'])}\b(?!-)|here [^:]*:)[ ,:!]*)+")
IMPERATIVE = re.compile(rf"(?i){either(LEXICON['imperatives'])}\b")
ADJECTIVE = re.compile(
    r"(?i)(?<![\w-])(?:(?:predominantly|mostly|mainly|largely) )?"
    rf"(?:(?:{DIRECTION}(?:ern)?|central)[- ])?{either(LEXICON['checkable_adjectives'])}(?![\w-])")
# Where a clause begins: after "and" or a comma; a border or "with a population" also after a blank.
CLAUSE = re.compile(
    r"(?i)(?:[,;]\s*|\s+)(?:and|but|while|yet)\s+(?:also\s+)?"
    rf"(?=(?:its?|with|the (?:economy|people|country|government))\b|{VERB}|{ACTIVE}|{PASSIVE})"
    rf"|[,;]\s*(?:also\s+)?(?=(?:where|it|with|which (?:is )?border\w+)\b|{ACTIVE}|{PASSIVE})"
    rf"|(?:(?<=country)|(?<=nation)|(?<=state)) (?=(?:that|which) {VERB})"
    r"|,?\s+(?:that|which) (?:is|are) (?=(?:bordered|surrounded) by\b)"
    r"|(?<! is)(?<! are)(?<! also)\s+(?=(?:bordered by|bordering|surrounded by|sharing"
    r"|with an? (?:\w+ )?population)\b)")


def resolve(text, topic):
    """Pronouns for the topic become the topic: "It is", "The country's" -> "Peru is", "Peru's"."""
    noun = rf"(?:country|nation|state|island nation|island|republic)(?: of {re.escape(topic)})?"
    put = topic.replace("\\", r"\\")  # else re.sub reads escapes in it
    text = re.sub(r"(?i)^it['\u2019]s ", "It is ", text)
    text = re.sub(r"(?i)^they(?= )", f"The people of {put}", text)
    text = re.sub(rf"(?i)^(?:it|this|(?:the|this) {noun})(?= (?:also )?{VERB})", put, text)
    text = re.sub(rf"(?i)^(?:its|their|(?:the|this) {noun}['\u2019]s)\b", f"{put}'s", text)
    return re.sub(rf"\b(?:the|this) {noun}['\u2019]s\b", "its", text)


def whole_clause(clause, subject, topic):
    """A clause that lost its subject gets it back: "with a coast" -> "Peru has a coast"."""
    clause = re.sub(r"(?i)^(?:which|that|where)\s+(?=\S)", "", clause.strip(" ,;.:!?"))
    clause = resolve(clause, topic)
    first = clause.split(" ")[0].lower()
    if first == "with" or first in LEXICON["participles"]:
        return f"{subject} {LEXICON['participles'].get(first, 'has')}{clause[len(first):]}"
    if re.match(PASSIVE, clause):
        return f"{subject} is {clause}"
    return f"{subject} {clause}" if re.match(VERB, clause) else clause


def list_items(text):
    """"A, B, and C" -> [A, B, C]; names that hold an "and" and pairs of directions stay whole."""
    for name in LEXICON["and_names"]:
        text = text.replace(name, name.replace(" and ", "\0and\0"))
    text = re.sub(rf"\b({DIRECTION}),? and (?:to )?(?:the )?(?={DIRECTION}\b)", "\\1\0and\0", text)
    items = re.split(r",\s*(?:and\s+|as well as\s+)?|;\s*|\s+(?:and|as well as)\s+", text)
    return [item.replace("\0", " ").strip() for item in items if item.strip()]


def each_item(clause):
    """"X is bordered by A to the north, B and C to the east" -> three; so members, exports, ..."""
    found = LIST.match(clause)
    head, tail = found.groups() if found else ("", "")
    tail = re.sub(r"^.*?\b(?:including|such as|namely)\s+", "", tail)
    if re.match(rf"{ASIDE} by ", tail):  # "bordered to the north by A, to the east by B"
        head, tail = f"{head} by", re.sub(rf"({ASIDE}) by (.+?)(?=,|;|$)", r"\2 \1", tail)
    items = list_items(tail)
    named = rf"(?:{MEMBER})?(?:the )?(?:\w+ of (?:the )?)?{CAPITAL}|{ASIDE}"
    short = 0 if re.search(BORDER, head) else 6  # neighbours are names; exports need not be
    if len(items) < 2 or any(len(i.split()) > short and not re.match(named, i) for i in items):
        return [clause]
    out, waiting = [], []  # names wait for the direction that closes their list
    for item in items:
        side = re.search(rf"(?:^| )({ASIDE}.*)$", item)
        if side and not side.start() and out:
            out.append(f"{re.sub(rf' {ASIDE}.*', '', out[-1])} {item}")
        elif side:
            out += [f"{head} {name} {side[1]}" for name in waiting] + [f"{head} {item}"]
            waiting = []
        else:
            waiting.append(item)
    out += [f"{head} {name}" for name in waiting]  # an item may bring its own "founding member of"
    return [re.sub(f"{MEMBER}(?={MEMBER})", "", fact) for fact in out]


def each_adjective(clause, subject):
    """"X is a landlocked state in Asia" -> "X is a landlocked state", "X is a state in Asia"."""
    found = re.match(rf"({re.escape(subject)} (?:is|was|are)(?: also)?) an? "
                     rf"((?:[\w-]+,? (?:and )?){{1,6}}?)({NOUN})(?! {NOUN})(.*\w.*)", clause)
    if not found or re.search(r"est\b|\b(?:most|only|first|second)\b", found[2]):
        return [clause]
    head, adjectives, noun, rest = found.groups()
    out = []
    for adjective in ADJECTIVE.findall(adjectives):
        adjectives = re.sub(rf"{re.escape(adjective)},?\s*(?:and\s+)?", "", adjectives, count=1)
        out.append(f"{head} a {adjective} {noun}")
    left = f"{head} a {re.sub(r'(?:,| and)$', '', adjectives.strip())} {noun}{rest}"
    return out + [" ".join(left.split())] if out else [clause]


def facts(sentence, topic):
    """The statements of a sentence, each to stand alone, each once; none of headings, questions."""
    text = LEAD_IN.sub("", LIST_MARKER.sub("", re.sub(r"[*_`]+", "", sentence), 1).strip(), 1)
    if len(text.split()) < 3 or text[0] == "#" or text[-1] in "?:" or IMPERATIVE.match(text):
        return []
    text, out = resolve(text[:1].upper() + text[1:], topic), []
    text = re.sub(r" and (?:with )?(?=(?:the |an )?atomic number)", ", with ", text)
    beside = re.match(rf"([^,]{{2,60}}), (?!(?:and|but|with|which)\b|{PASSIVE}|{ACTIVE})"
                      rf"([^,]{{2,90}}), (?={VERB})", text)
    if beside and not re.search(rf"\s{VERB}", beside[1]):  # "Peru, a nation in Asia, is ..."
        out.append(f"{beside[1]} is {beside[2]}")
        text = f"{beside[1]} {text[beside.end():]}"
    first, *others = CLAUSE.split(text)
    verb = re.search(rf"(?: also| now)? (?={VERB})", first)
    subject = first[:verb.start()].rstrip(", ") if verb else topic
    if not verb and re.match(rf"(?i){PASSIVE}|an? ", first):  # "A country in Asia, bordered ..."
        first = f"{topic} is {first[:1].lower() + first[1:]}"
    for clause in [first.strip(" ,;.:!?")] + [whole_clause(c, subject, topic) for c in others]:
        out += [fact for item in each_item(clause) for fact in each_adjective(item, subject)]
    return [re.sub(r"\ba (?=(?!uni|eu|one)[aeiou])", "an ", fact)
            for fact in dict.fromkeys(out) if len(fact.split()) >= 3]


# ---------------------------------------------------------------------------------------------
# Normal forms and numbers

TOKEN = re.compile(r"\d+(?:[.,]\d+)+|[a-z0-9]+(?:[-'][a-z0-9]+)*")
PHRASES = re.compile(rf"(?<![\w-]){either(LEXICON['phrases'])}(?![\w-])")
SHARES = re.compile(rf"(?i)\b{either(LEXICON['fractions'])}\b")
NUMBER = re.compile(
    r"(?i)(?P<money>(?:US)?\$\s*)?(?<![\w.])"
    rf"(?P<value>\d+(?:,\d{{3}})*(?:\.\d+)?|{either(LEXICON['number_words'])}\b)(?P<rank>(?:st|nd|rd|th)\b)?"
    rf"(?:\s*(?P<scale>{either(LEXICON['scales'])})\b)?[\s-]*(?P<unit>%|{either(LEXICON['units'])}s?\b)?"
    rf"|(?P<nth>{either(LEXICON['ranks'])})\b")


def ascii_lower(text):
    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    return text.encode("ascii", "ignore").decode().lower()


@lru_cache(100_000)
def stem(word):
    """One form for all forms of a word: synonyms by table, directions, plural, -ed and -ing."""
    word = word.removesuffix("'s")
    word = LEXICON["synonyms"].get(word, word)
    side = re.fullmatch(rf"({DIRECTION})(?:ern|wards?|erly)?", word)
    if side:
        return re.sub("[- ]", "", side[1])
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("ing", ""), ("ed", ""), ("s", "")):
        long = len(word) - len(ending) >= 4
        if long and word.endswith(ending) and not word.endswith(("ss", "us", "is")):
            return LEXICON["synonyms"].get(form := word[:-len(ending)] + instead, form)
    return word


@lru_cache(100_000)
def normal(text):
    """Normal forms of the words: "the members of the United Nations" -> "member of un"."""
    low = PHRASES.sub(lambda m: LEXICON["phrases"][m[0]], ascii_lower(text))
    return " ".join(stem(w) for w in TOKEN.findall(low) if w not in ("the", "a", "an"))


def words(text):
    return normal(text).split()


@lru_cache(100_000)
def numbers(text):
    """[(kind, value, words before it)]; kind: year, rank, share, length, area, money or count."""
    text, found = SHARES.sub(lambda m: LEXICON["fractions"][m[0].lower()], text), []
    for m in NUMBER.finditer(text):
        raw, unit = (m["value"] or m["nth"]).lower(), (m["unit"] or "").lower()
        kind, factor = LEXICON["units"].get(unit.rstrip("s"), ("count", 1))
        kind = "rank" if m["nth"] or m["rank"] else "money" if m["money"] else kind
        if kind == "count" and not m["scale"] and re.fullmatch(r"1\d{3}|20\d\d", raw):
            kind = "year"
        value = (LEXICON["ranks"] | LEXICON["number_words"]).get(raw) or float(raw.replace(",", ""))
        value *= factor * LEXICON["scales"].get((m["scale"] or "").lower(), 1)
        if (kind, raw) != ("count", "one"):  # "one of the largest"
            found.append((kind, value, text[:m.start()]))
    return found


def agree(claimed, stated):
    """Do two numbers say the same? Years, ranks and counts to 20 exactly; others within 5 %, or as
    "more than" and "less than" before the claimed one allow (10 million for 12.3 million)."""
    (kind, a, before), (other, b, _) = claimed, stated
    if kind != other:
        return False
    if kind in ("year", "rank") or (kind == "count" and a <= 20):
        return a == b
    if before in LEXICON["most"]:
        return b >= 50
    if re.search(r"(?i)(?:more than|over|above|at least)\s*$", before):
        return a <= b <= 1.25 * a
    if re.search(r"(?i)(?:less than|fewer than|under|below)\s*$", before):
        return a / 1.25 <= b <= a
    return abs(a - b) <= .05 * abs(b)


# ---------------------------------------------------------------------------------------------
# The lexical check: names, numbers and directions of a statement in ONE passage whose field fits

FILLER = {form for w in LEXICON["filler"] for form in (w, stem(w))}
VAGUE, MUST, MARKERS = ({stem(w) for w in LEXICON[k]} for k in ("vague", "must_be_said", "markers"))
SEA = re.compile(r"(?i)\b(?:sea|ocean|gulf|bay|strait|channel|archipelago)\b")
PARTS = re.compile(r"\b(?:includ|home to|consists? of|made up of|compos|compris|contains?)")


def read_page(page, topic, titles=()):
    """What check() looks things up in, from the passages {title, field?, text} of one topic.

    units  {field, text, words, whole, passage}: each passage (long prose sentence by sentence),
           each segment of a list; and derived: "neighbour", a country or sea that is bordered, and
           "side", a name whose direction is entailed ("south of Libya": Libya is in the north)
    own    normal forms of the topic's own words: its names and nationality"""
    units, sides, own = [], {}, words(topic)

    def add(field, text, passage, whole=False):
        units.append({"field": field, "text": text, "words": f" {normal(text)} ", "whole": whole,
                      "passage": passage})

    for passage in sorted(page, key=lambda p: p.get("field") == "Land boundaries"):  # sides first
        field, text = passage.get("field", ""), passage["text"]
        if field == "International organization participation":  # observers are no members
            text = re.sub(r"; note.*|[^,]*\([^)]*(?:observer|candidate|associate)[^)]*\)", "", text)
            text = re.sub(r"(?<![\w-])C(?=,| \()", "Commonwealth", text)
        elif field in ("Location", "Geography - note"):
            text = re.sub(rf"{NAME} \({either(titles or '-')}\)", "", text)  # "Azores (Portugal)"
            for side, name in re.findall(rf"\b({DIRECTION}) of (?:the )?({CAPITAL}[\w' ]*)", text):
                sides[name] = f"{sides.get(name, '')} lies-{LEXICON['opposites'][stem(side)]}"
                add("side", name + sides[name], passage)
            text = re.sub(rf"\b{DIRECTION} of (?:the )?{NAME}", "", text)  # kept as a side
            for sea in filter(SEA.search, re.findall(NAME, text) if field == "Location" else []):
                add("neighbour", sea + sides.get(sea, ""), passage)
        elif field == "Land boundaries":
            listed = re.findall(rf"(?:\w: |; )({CAPITAL}[^;:\d]*?) ([\d.,]+ km)", text)
            for name, km in listed:
                add("neighbour", f"{name} {km}{sides.get(name, '')}", passage)
            add("neighbour", f"{len(listed)} countries", passage)
        elif field in ("Nationality", "Country name"):
            own += words(" ".join(re.findall(r"(?:noun|adjective|l short form): ([^;(]*)", text)))
        labelled = len(re.findall(r"(?:^|; )[^:;,]{2,40}: ", text)) > 1  # "total: 9; male: 4; ..."
        if len(text.split()) > 60 and ". " in text:
            for start, end in sentences(text):
                add(field, text[start:end], passage)
            continue
        for whole in text.split("; ") if labelled else [text]:
            add(field, whole, passage, whole=True)
        for piece in re.split("[;,] ", text):
            add(field, piece, passage)
    return {"units": units, "own": set(own) - FILLER - set(LEXICON["never_own"]), "topic": topic,
            "titles": titles, "countries": {normal(t) for t in titles}}


def parse(claim, topic, titles=()):
    """A claim as data, without the topic's name: names, numbers, sides, content (other words)."""
    longer = either([t for t in titles if topic in t and t != topic] or "\0")  # not the Sudan of
    about = r"(?:(?:the )?(?:government|people|country|nation|economy) of )?"     # "South Sudan"
    name = rf"(?:\bthe )?\b{re.escape(topic)}\b(?:['\u2019]s)?"
    text = re.sub(rf"(?i)({longer})|{about}{name}", lambda m: m[1] or "\u00b7", claim)
    text = SHARES.sub(lambda m: LEXICON["fractions"][m[0].lower()], text)
    text = re.sub(rf"\b{DIRECTION}(?:ern)? (?={CAPITAL})", lambda m: m[0].capitalize(), text)
    names, rest = [], text
    for m in re.finditer(NAME, text):
        for name in list_items(re.sub(r"^The ", "", m[0])):
            if text.startswith(name) and name not in titles:  # any sentence opens with a capital
                name = name.partition(" ")[2]
            if name and normal(name) not in FILLER:
                names.append(normal(name))
                rest = rest.replace(name, " ", 1)
    sides = [stem(m[0].lower()) for m in re.finditer(rf"(?i)\b{DIRECTION}(?:ern)?\b", rest)]
    content = [w for w in words(NUMBER.sub(" ", rest)) if w not in FILLER and w not in sides]
    if re.search(rf"(?i)\b{DIRECTION} of (?!\u00b7)", text):  # "lies east of B": B is in the west
        sides = [LEXICON["opposites"][side] for side in sides]
    most = [("share", 50, w) for w in LEXICON["most"] if w in rest.lower()]
    return dict(text=text, names=names, numbers=numbers(rest) + most, sides=sides, content=content)


def carried(unit, c, names, need, relations):
    """Does this unit carry each name, number, direction and nearly each other word of a claim?"""
    here, stated = set(unit["words"].split()), numbers(unit["text"])
    lies = "lies-" * (unit["field"] in ("neighbour", "side"))
    same = (lambda n, s: n[:2] == s[:2]) if any("exact" in r for r in relations) else agree
    if not all(f" {name} " in unit["words"] for name in names) or \
            not all(lies + side in here for side in c["sides"]) or \
            not all(n[2] in here or any(same(n, s) for s in stated) for n in c["numbers"]):
        return False
    said = set(words(c["text"]))
    if not unit["whole"] and (here ^ said) & MARKERS:
        return False  # "male: 4,100,000" is not the population, "total" not the land area
    if any(re.search(rf" (?:almost|nearly|not|never|formerly) {re.escape(w)} ", unit["words"])
           for w in need):
        return False  # "Jordan is almost landlocked"
    strict = [r for r in relations if r["strict"]]
    if strict and unit["field"] == strict[0]["fields"][0]:  # "Languages" says "language" by itself
        need = [w for w in need if w not in strict[0]["implied"]]
    solid = [w for w in need if w not in VAGUE]
    prose = len(here) > 8 and not unit["whole"]  # one common word in a long text says little
    if not (names or (c["numbers"] and strict) or len(solid) > prose or (need and not prose)):
        return False  # nothing but the field's name: "Peru has a population"
    beside = names or c["numbers"] or (strict and here & set(solid))
    missing = [w for w in need if w not in here and not (w in VAGUE and beside)]  # praise is free
    opening = words(c["text"])[:1]  # the subject, where it is not the topic
    return not any(w in MUST or w in opening for w in missing) and len(missing) <= len(need) // 4


def check_part(claim, page):
    """(label, passage or None, is it praise?) of one part of a claim; IR: nothing to check."""
    c = parse(claim, page["topic"], page["titles"])
    names = [n for n in c["names"] if not set(n.split()) <= page["own"]]
    need = [w for w in c["content"] if w not in page["own"]]
    if not (names or set(need) - {"government", "economy"} or c["numbers"] or c["sides"]):
        return ("NS" if c["names"] else "IR"), None, False
    there = {u["field"] for u in page["units"]} | {"neighbour", "side"}
    relations = [r for r in LEXICON["relations"] if there & set(r["fields"])
                 and re.search(r["says"], c["text"].lower())]
    relations = [r for r in relations if r["strict"]][:1] or relations  # a strict one decides alone
    fields = {field for r in relations for field in r["fields"]}
    solid = c["numbers"] or set(need) - VAGUE
    if not (fields or solid or PARTS.search(claim)):  # a bare "X is in Y", or "X is Y"
        lies = re.search(rf"\b(?:in|on|off|near|between|along|at) |{CAPITAL}\w+ {NOUN}", c["text"])
        fields = {"Location", "Map references", "Geography - note"} if lies else {"Country name"}
    praise = not (solid or names or c["sides"])
    abroad = [n for n in names if n in page["countries"] or SEA.search(n)]
    inside = [n for n in abroad if f" in {n} " in f" {normal(c['text'])} "]
    parts = abroad and PARTS.search(claim) and "neighbour" not in fields
    for unit in page["units"]:
        if unit["field"] not in (fields or there - {"neighbour", "side"}) or \
                (unit["whole"] and (c["numbers"] or "official" in need)):
            continue  # each number, each "(official)" of a list belongs to its own segment
        if parts and not PARTS.search(unit["text"]):
            continue  # a neighbour or a sea is no part, unless it is said to be
        if inside and (re.search(r"\bborder", unit["text"]) or page["countries"] & set(inside)):
            continue  # "in the Baltic Sea" is not "bordering the Baltic Sea"
        if carried(unit, c, names, need, relations):
            return "S", unit["passage"], praise
    return "NS", None, praise


def check(claim, page):
    """(S, NS or IR, passages that carry the claim). Every part must be carried; one that is only
    praise is passed over beside one that can be checked; IR: there is nothing to check."""
    parts = facts(claim, page["topic"])
    judged = [check_part(p, page) for p in (parts if len(parts) > 1 else [claim])]
    judged = [j for j in judged if j[0] != "IR"]
    judged = [j for j in judged if not j[2]] or judged
    label = ("S" if all(j[0] == "S" for j in judged) else "NS") if judged else "IR"
    return label, [passage for _, passage, _ in judged if passage]
