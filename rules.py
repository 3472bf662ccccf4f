"""
Offline stand-ins for an LLM: no paper's idea lives here. Deterministic, no model, no network.

sentences(text)         exact spans of sentences                              02
facts(sentence, topic)  statements that stand alone, their subject put back   02
read_page, check        does a page of a reference work carry a statement?    03
kind_of                 border, direction, capital, number, ...               03
fact_key(fact, topic)   what a fact says: repeats share it                    04, 06

Word tables (abbreviations, verbs, organisations, regions, units, relations) are data: data/lexicon.json.
"""
import json
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

LEXICON = json.loads((Path(__file__).parent / "data" / "lexicon.json").read_text(encoding="utf-8"))
I = re.IGNORECASE


def either(words):
    """A pattern for any of these words, longest first."""
    return "(?:" + "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) + ")"


# ---------------------------------------------------------------------------------------------
# Sentences

SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*]*(?=\s|$)")
LIST_MARKER = re.compile(r"\s*(?:[-*\u2022]|\(?\d{1,3}[.)]|[a-z][.)]|#+)\s+")


def ends_sentence(mark, before, rest):
    """Does the punctuation `mark` end a sentence, between the words before it and the rest of its line?"""
    if not rest:
        return True
    if mark[0] != ".":
        return rest[0].isupper() or not rest[0].isalpha()
    word = before[-1].lstrip("(\"'\u201c").lower() if before else ""
    initial = re.fullmatch(r"[a-z](\.[a-z])*", word)  # "J. K. Rowling", "U.S. dollars"
    return not (rest[0].islower() or initial or word in LEXICON["abbreviations"])


def sentences(text):
    """[(start, end)] of the sentences of `text`, without the white space around them.

    A line break always ends a sentence (lists, headings); decimals, initials, abbreviations and closing
    quotes do not. Between two spans there is only white space, so nothing of the text is lost.
    """
    spans = []
    for line in re.finditer(r"[^\r\n\u2028\u2029]+", text):
        start = line.start()
        marker = LIST_MARKER.match(line.group())
        for m in SENTENCE_END.finditer(text, start + (marker.end() if marker else 0), line.end()):
            if ends_sentence(m.group(), text[start:m.start()].split(), text[m.end():line.end()].lstrip()):
                spans.append((start, m.end()))
                start = m.end()
        spans.append((start, line.end()))
    pieces = [(start, text[start:end]) for start, end in spans if text[start:end].strip()]
    lefts = [start + len(piece) - len(piece.lstrip()) for start, piece in pieces]
    return [(left, left + len(piece.strip())) for left, (_, piece) in zip(lefts, pieces)]


def is_abstention(text):
    """A reply that declines to answer, or says nothing."""
    sorry = r"\s*(?:i'?m sorry|i apologi[sz]e|i (?:can ?not|can't|am unable|do(?:n't| not) have)|as an ai\b)"
    return not text.strip() or bool(re.match(sorry, text.replace("\u2019", "'"), I))


# ---------------------------------------------------------------------------------------------
# Facts: a sentence becomes statements that stand alone

DIRECTION = r"(?:(?:north|south)(?:[- ]?(?:east|west))?|east|west)"
ASIDE = rf"(?:to|on|in|along) (?:the|its) {DIRECTION}"
VERB = either(LEXICON["finite_verbs"]) + r"\b"
PASSIVE = either(LEXICON["passives"]) + r"\b"
ACTIVE = either(LEXICON["participles"]) + r"\b"
NOUN = either(LEXICON["country_nouns"]) + r"\b"
CAPITAL = r"[A-Z\u00c0-\u00de]"
NAMES = re.compile(rf"{CAPITAL}[\w'\u2019.-]*(?:(?: of(?: the)?| and)? {CAPITAL}[\w'\u2019.-]*)*")
BORDER = (r"\b(?:border(?:s|ed|ing)?(?: by| with| on)?|surrounded by|surrounding|flanked by|bounded by"
          r"|shar(?:es|ing) (?:its |a |an )?(?:\w+ )?borders? with|neighbou?rs(?: include)?)")
LEAD_IN = re.compile(rf"(?:(?:{either(LEXICON['lead_ins'])}\b|here (?:is|are)[^:]*:)\s*[,:!]?\s*)+", I)
# Where a clause begins: after a comma or "and"; a border or "with a population" also after a blank.
CLAUSE = re.compile(rf"(?:[,;]\s*|\s+)(?:and|but|while|yet)\s+(?:also\s+)?(?=(?:its?\b|with\b|{VERB}|{ACTIVE}|{PASSIVE}))"
                    rf"|[,;]\s*(?:also\s+)?(?=(?:which|that|where|it|with)\b|{VERB}|{ACTIVE}|{PASSIVE})"
                    rf"|\s+(?=(?:that|which)\s+{VERB})|\s+(?=(?:bordered by|bordering|surrounded by|sharing)\b)"
                    r"|\s+(?=with an? (?:\w+ )?(?:population|area|coastline|gdp)\b)", I)


def resolve(text, topic):
    """Pronouns that stand for the topic become the topic: "It is", "The country's" -> "Peru is", "Peru's"."""
    noun = rf"(?:country|nation|state|island nation|island|republic|kingdom)(?: of {re.escape(topic)})?"
    text = re.sub(rf"^(?:it|(?:the|this) {noun}|this(?= (?:is|has|was)))(?= )", topic, text, flags=I)
    text = re.sub(r"^they(?= )", f"The people of {topic}", text, flags=I)
    text = re.sub(rf"^(?:its|their|(?:the|this) {noun}['\u2019]s)\b", f"{topic}'s", text, flags=I)
    return re.sub(rf"\b(?:the|this) {noun}['\u2019]s\b", "its", text)


def cut_clauses(text):
    """Cut a sentence where clauses begin. A "which" or "that" is cut off only behind a name or a country noun
    (else it speaks of something unnamed), and no cut leaves a subject without its verb."""
    pieces, glue, start = [], "", 0
    for cut in [*CLAUSE.finditer(text), None]:
        piece = text[start:cut.start() if cut else len(text)]
        behind = pieces[-1].split()[-1].strip(",.") if pieces else ""
        named = behind[:1].isupper() or re.fullmatch(NOUN, behind)
        relative = re.match(r"(?:which|that|who|where)\b(?! (?:is )?(?:border|surrounded))", piece)
        verbless = len(pieces) == 1 and not re.search(rf"\s{VERB}", pieces[0]) and re.match(VERB, piece)
        if pieces and (verbless or (relative and not named)):
            pieces[-1] += glue + piece
        elif piece.strip(" ,.;"):
            pieces.append(piece)
        if cut:
            glue, start = cut.group(), cut.end()
    return pieces or [text]


def whole_clause(clause, subject, topic):
    """A clause that lost its subject gets it back: "with a coast" -> "Peru has a coast"."""
    clause = re.sub(r"^(?:which|that|who|where)\s+(?=\S)", "", clause.strip(" ,;.:!?"), flags=I)
    if re.match(r"its? ", clause, I):
        return re.sub(r"^its ", f"{topic}'s ", re.sub(r"^it ", f"{topic} ", clause, flags=I), flags=I)
    first = clause.split()[0].lower() if clause else ""
    if first == "with":
        return f"{subject} has {clause[5:]}"
    if first in LEXICON["participles"]:
        return f"{subject} {LEXICON['participles'][first]}{clause[len(first):]}"
    if re.match(PASSIVE, clause, I):
        return f"{subject} is {clause}"
    return f"{subject} {clause}" if re.match(VERB, clause, I) else clause


def list_items(text):
    """"A, B, and C" -> [A, B, C]; names that hold an "and", and pairs of directions, stay whole."""
    for name in LEXICON["and_names"]:
        text = text.replace(name, name.replace(" and ", "\0and\0"))
    text = re.sub(rf"\b({DIRECTION}),? and (?:to )?(?:the )?(?={DIRECTION}\b)", "\\1\0and\0", text)
    items = re.split(r",\s*(?:and\s+|as well as\s+)?|;\s*|\s+(?:and|as well as)\s+", text)
    return [item.replace("\0", " ").strip() for item in items if item.strip()]


def each_border(clause):
    """"X is bordered by A to the north, B and C to the east" -> three statements."""
    found = re.match(rf"(.*?{BORDER})\s+(.+)", clause)
    if not found:
        return [clause]
    head, tail = found[1], re.sub(r"^.*?\b(?:including|such as|namely)\s+", "", found[2])
    if re.match(rf"{ASIDE} by ", tail):  # "bordered to the north by A, to the east by B"
        head, tail = head + " by", re.sub(rf"({ASIDE}) by (.+?)(?=,|;|$)", r"\2 \1", tail)
    items = list_items(tail)
    if len(items) < 2 or not all(re.match(rf"(?:the )?{CAPITAL}|{ASIDE}", item) for item in items):
        return [clause]
    out, waiting = [], []  # names wait for the direction that closes their list
    for item in items:
        side = re.search(rf"(?:^|\s)({ASIDE}.*)$", item)
        if side and not side.start() and out:
            out.append(f"{re.sub(rf' {ASIDE}.*', '', out[-1])} {item}")
        elif side:
            out += [f"{head} {name} {side[1]}" for name in waiting] + [f"{head} {item}"]
            waiting = []
        else:
            waiting.append(item)
    return out + [f"{head} {name}" for name in waiting]


def each_listed(clause):
    """Members, languages, exports and the like: one statement for each thing that is named."""
    found = re.match(rf"(.*?\b(?:{'|'.join(LEXICON['lists'])})\s+)(.+)", clause)
    items = list_items(found[2]) if found else []
    if len(items) < 2 or any(len(item.split()) > 7 for item in items):
        return [clause]
    again = r"^(?:is |are )?(?:an? |the )?(?:founding )?members? of (?=\S)"
    return [found[1] + re.sub(again, "", item) for item in items]


def article(words):
    return "an" if re.match(r"(?!uni|eu|one)[aeiou]", words, I) else "a"


def each_adjective(clause, subject):
    """"Peru is a landlocked country in Asia" -> "Peru is a landlocked country", "Peru is a country in Asia"."""
    found = re.match(rf"({re.escape(subject)} (?:is|was)(?: also)?) (an?|the) ((?:[\w-]+,? (?:and )?){{1,6}}?)"
                     rf"({NOUN})(?! {NOUN})(.*)", clause)
    if not found or not re.search(r"\w", found[5]) or re.search(r"est\b|\b(?:most|only|first|second)\b", found[3]):
        return [clause]
    head, the, adjectives, noun, rest = found.groups()
    side = rf"(?:(?:predominantly|mostly|mainly|largely) )?(?:(?:{DIRECTION}(?:ern)?|central)[- ])?"
    checkable = re.findall(rf"(?<![\w-]){side}{either(LEXICON['checkable_adjectives'])}(?![\w-])", adjectives, I)
    for adjective in checkable:
        adjectives = re.sub(rf"{re.escape(adjective)},?\s*(?:and\s+)?", "", adjectives, count=1)
    left = re.sub(r"[,\s]+$|\band\s*$", "", adjectives).strip(" ,")
    words = " ".join(filter(None, [left, noun])) + rest
    out = [f"{head} {article(adjective)} {adjective} {noun}" for adjective in checkable]
    return out + [f"{head} {'the' if the == 'the' else article(words)} {words}"] if out else [clause]


def facts(sentence, topic):
    """Statements of one sentence that stand alone, in order, each once; [] for headings and questions."""
    text = LEAD_IN.sub("", LIST_MARKER.sub("", re.sub(r"[*_`#]+", "", sentence), 1).strip(), 1)
    if len(text.split()) < 3 or text[-1:] in "?:" or re.match(either(LEXICON["imperatives"]) + r"\b", text, I):
        return []
    text = resolve(text[:1].upper() + text[1:], topic)
    out = []
    beside = re.match(rf"([^,]{{2,60}}), (?!(?:and|but|with|which)\b|{PASSIVE}|{ACTIVE})([^,]{{2,90}}), (?={VERB})", text)
    if beside and not re.search(rf"\s{VERB}", beside[1]):  # "Peru, a nation in Asia, is ..."
        out.append(f"{beside[1]} is {beside[2]}")
        text = f"{beside[1]} {text[beside.end():]}"
    first, *others = cut_clauses(text)
    verb = re.search(rf"\s(?={VERB})", first)
    label = re.match(r"([A-Za-z ]{3,30}):\s+(.+)", first)
    if verb and verb.start() <= 80:
        subject = re.sub(r"\s+(?:also|now|currently)$", "", first[:verb.start()].rstrip(", "))
    elif label:  # "Capital: Lima"
        subject, first = topic, f"{topic}'s {label[1].strip().lower()} is {label[2]}"
    else:
        subject, first = topic, f"{topic} is {first if NAMES.match(first) else first[:1].lower() + first[1:]}"
    for clause in [first.strip(" ,;.:!?")] + [whole_clause(c, subject, topic) for c in others]:
        for bordered in each_border(clause):
            for listed in each_listed(bordered):
                out += each_adjective(listed, subject)
    return [fact for fact in dict.fromkeys(out) if len(fact.split()) >= 3]


# ---------------------------------------------------------------------------------------------
# Normal forms and numbers

TOKEN = re.compile(r"[a-z0-9]+(?:[-'][a-z0-9]+)*")
PHRASES = re.compile(rf"(?<![\w-]){either(LEXICON['phrases'])}(?![\w-])")
SHARES = [(re.compile(rf"\b{said}\b", I), share) for said, share in LEXICON["fractions"].items()]
NUMBER = re.compile(
    rf"(?P<money>(?:US)?\$\s*)?(?<![\w.])(?P<value>\d+(?:,\d{{3}})*(?:\.\d+)?|{either(LEXICON['number_words'])}\b)"
    rf"(?P<rank>(?:st|nd|rd|th)\b)?(?:\s*(?P<scale>{either(LEXICON['scales'])})\b)?[\s-]*"
    rf"(?P<unit>%|(?:{either(set(LEXICON['units']) - {'%'})}s?)\b)?|(?P<nth>{either(LEXICON['ranks'])})\b", I)


def ascii_lower(text):
    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    return text.encode("ascii", "ignore").decode().lower()


@lru_cache(100_000)
def stem(word):
    """One form for all forms of a word: synonyms and regions by table, directions, plural, -ed and -ing."""
    def known(w):
        return LEXICON["synonyms"].get(w) or LEXICON["regions"].get(w, w)
    word = known(word.removesuffix("'s").strip("'"))
    side = re.fullmatch(rf"({DIRECTION})(?:ern|wards?|erly)?", word)
    if side:
        return re.sub("[- ]", "", side[1])
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("ing", ""), ("ed", ""), ("s", "")):
        if word.endswith(ending) and len(word) - len(ending) >= 4 and not word.endswith(("ss", "us", "is")):
            return known(word[:-len(ending)] + instead)
    return word


@lru_cache(100_000)
def normal(text):
    """Normal forms of the words of a text as one string, without articles; organisations and units by their
    short names: "the Gulf of Oman" -> "gulf of oman"."""
    low = PHRASES.sub(lambda m: LEXICON["phrases"][m.group()], ascii_lower(text))
    return " ".join(stem(w) for w in TOKEN.findall(low) if w not in ("the", "a", "an"))


def words(text):
    return normal(text).split()


def with_shares(text):
    """"nearly half" -> "nearly 50%"."""
    for said, share in SHARES:
        text = said.sub(share, text)
    return text


@lru_cache(100_000)
def numbers(text):
    """[(kind, value, words before it)] of a text; kind: year, rank, share, length, area, money or count."""
    text, found = with_shares(text), []
    for m in NUMBER.finditer(text):
        raw, unit = (m["value"] or m["nth"]).lower(), (m["unit"] or "").lower()
        kind, factor = LEXICON["units"].get(unit) or LEXICON["units"].get(unit.rstrip("s")) or ("count", 1)
        if m["nth"] or m["rank"]:
            kind = "rank"
        elif m["money"]:
            kind = "money"
        elif kind == "count" and not m["scale"] and re.fullmatch(r"1\d{3}|20\d\d", raw):
            kind = "year"
        value = LEXICON["ranks"].get(raw) or LEXICON["number_words"].get(raw) or float(raw.replace(",", ""))
        if raw != "one" or kind != "count" or m["scale"]:
            found.append((kind, value * factor * LEXICON["scales"].get((m["scale"] or "").lower(), 1),
                          text[:m.start()]))
    return found


def agree(claimed, stated):
    """Do two numbers say the same? Years, ranks and counts to 20 exactly; others within 5 %, or as "more than"
    and "less than" before the claimed one allow (LABELLING: "more than 10 million" for 12.3 million)."""
    (kind, a, before), (other, b) = claimed, stated[:2]
    if kind != other:
        return False
    if kind in ("year", "rank") or (kind == "count" and a <= 20):
        return a == b
    if before in ("majority", "predominantly", "mostly", "minority"):
        return b < 50 if before == "minority" else b >= 50
    if re.search(r"(?:more than|over|above|exceeding|at least)\s*$", before, I):
        return a <= b <= 1.25 * a
    if re.search(r"(?:less than|under|below|fewer than)\s*$", before, I):
        return a / 1.25 <= b <= a
    return abs(a - b) <= .05 * abs(b)


# ---------------------------------------------------------------------------------------------
# The lexical check: names, numbers and directions of a statement in ONE passage whose field fits

FILLER = {form for w in LEXICON["filler"] for form in (w, stem(w))}
VAGUE = {stem(w) for w in LEXICON["vague"]}
MUST = {stem(w) for w in LEXICON["must_be_said"]}
MARKERS = {stem(w) for w in LEXICON["markers"]}
SEA = re.compile(r"\b(?:sea|ocean|gulf|bay|strait|channel|lake|river|archipelago)\b")
PARTS = re.compile(r"\b(?:includ(?:es?|ing)|home to|consists? of|made up of|composed of|comprises?|contains?)\b")


def read_page(page, topic, titles=()):
    """What check() looks things up in, from the passages {title, field?, text} of one topic.

    units   {"field", "text", "words", "passage"}: each passage (a long prose field sentence by sentence); each
            segment of a list; and two derived fields: "neighbour", one unit a country or sea that is bordered,
            and "side", one unit a name whose direction is entailed ("south of Libya": Libya lies to the north)
    own     normal forms of the topic's own words: its names and nationality
    """
    units, sides, own = [], {}, words(topic)
    fields = {p.get("field", ""): p for p in page}

    def add(field, text, passage, whole=False):
        units.append({"field": field, "text": text, "words": f" {normal(text)} ", "whole": whole, "passage": passage})

    for passage in page:
        field, text = passage.get("field", ""), passage["text"]
        if field == "International organization participation":  # observers and candidates are no members
            text = re.sub(r"; note.*|[^,]*\([^)]*(?:observer|candidate|associate|partner|cooperating)[^)]*\)", "", text)
            text = re.sub(r"(?<![\w-])C(?=,| \()", "Commonwealth", text)
        elif field == "Geographic coordinates":
            poles = {"N": "Northern", "S": "Southern", "E": "Eastern", "W": "Western"}
            text += "".join(f"; {poles[p]} Hemisphere" for p in re.findall(r"\d ([NSEW])\b", text))
        elif field in ("Location", "Geography - note"):
            text = re.sub(rf"[A-Z][\w' ]+ \({either(titles or ['-'])}\)", "", text)  # "Azores (Portugal)"
            for side, name in re.findall(rf"\b({DIRECTION}) of (?:the )?([A-Z][\w' ]*)", text):
                sides.setdefault(name, []).append((LEXICON["opposites"][stem(side)], passage))
        elif field in ("Nationality", "Country name"):
            own += words(" ".join(re.findall(r"(?:noun|adjective|[l ]short form|abbreviation): ([^;(]*)", text)))
        prose = len(text.split()) > 60 and ". " in text
        for piece in [text[a:b] for a, b in sentences(text)] if prose else [text]:
            add(field, piece, passage, whole=not prose)
        if not prose:
            for piece in re.split(rf"; |, (?={CAPITAL}|\d)", text):
                add(field, piece, passage)
    for name, found in sides.items():
        for side, passage in found:
            add("side", f"{name} {side}", passage)
    land, place = (fields.get(f, {}).get("text", "") for f in ("Land boundaries", "Location"))
    listed = re.findall(r"(?:countries(?: \(\d+\))?: |; )([A-Z][^;:\d]*? [\d.,]+ km)", land)
    seas = [name for name in NAMES.findall(place) if SEA.search(name.lower())]
    for item in listed + [f"{len(listed)} countries" if listed else "", *seas]:
        name = re.sub(r" [\d.,]+ km|^the ", "", item)
        add("neighbour", f"{item} {' '.join(s for s, _ in sides.get(name, []))}",
            fields["Land boundaries" if item not in seas else "Location"])
    return {"units": units, "own": set(own) - FILLER, "topic": topic, "titles": titles,
            "countries": {normal(t) for t in titles}}


def parse(claim, topic, titles=()):
    """A claim as data, the topic's own name left out: names, numbers, sides, content (other words)."""
    longer = either([t for t in titles if topic in t and t != topic] or ["\0"])  # "South Sudan" is not Sudan
    text = re.sub(rf"({longer})|(?:(?:the )?(?:government|people|country|nation|economy) of )?"
                  rf"(?:\bthe )?\b{re.escape(topic)}\b(?:['\u2019]s)?", lambda m: m[1] or "\u00b7", with_shares(claim), flags=I)
    names, rest = [], text
    for m in NAMES.finditer(text):
        name = re.sub(r"^The ", "", m.group())
        if not text[:m.start()].strip() and name not in titles:  # any sentence opens with a capital
            name = name.partition(" ")[2]
        if name and normal(name) not in FILLER:
            names.append(normal(name))
            rest = rest.replace(name, " ", 1)
    sides = [stem(m[0].lower()) for m in re.finditer(rf"\b{DIRECTION}(?:ern)?\b", rest, I)]
    content = [w for w in words(NUMBER.sub(" ", rest)) if w not in FILLER and w not in sides]
    if re.search(rf"\b{DIRECTION} of (?!\u00b7)", text, I):  # "lies east of B": B is in the west
        sides = [LEXICON["opposites"][side] for side in sides]
    found = numbers(rest) + [("share", 50.0, m[0]) for m in re.finditer("majority|minority|predominantly|mostly", rest)]
    return {"text": text, "names": names, "numbers": found, "sides": sides, "content": content}


def kind_of(claim, topic):
    """border, direction, capital, membership, number, region, place, vague or other: one kind a claim."""
    c = parse(claim, topic)
    low = c["text"].lower()
    if re.search(BORDER, low):
        return "direction" if c["sides"] else "border"
    for kind, pattern in LEXICON["kinds"]:
        if re.search(pattern, low):
            return kind
    if c["numbers"]:
        return "number"
    if re.search(rf"\b{DIRECTION} of\b|\bto the {DIRECTION}\b", low):
        return "direction"
    if re.search(r"\b(?:africa|asia|europe|america|caribbean|oceania|middle east|balkan|baltic)", low):
        return "region"
    if c["names"] and re.search(r"\b(?:located|situated|nestled|lies|in|off|on|between)\b", low):
        return "place"
    vague = [w for w in c["content"] if w in VAGUE]
    return "vague" if not c["names"] and len(vague) * 2 >= len(c["content"]) else "other"


def relations_of(claim, page):
    """The relations that a claim speaks of, among those that this page has fields for; a strict one decides."""
    there, found = {u["field"] for u in page["units"]}, []
    for relation in LEXICON["relations"]:
        if re.search(relation["says"], claim, I) and (relation["always"] or there & set(relation["fields"])):
            found.append(relation)
            if relation["strict"]:
                return [relation]
    return found


def carried(unit, c, names, need, relations):
    """Does this one unit carry every name, number and direction, and nearly every other word of the claim?"""
    here = set(unit["words"].split())
    if not all(f" {name} " in unit["words"] for name in names) or not here.issuperset(c["sides"]):
        return False
    stated = numbers(unit["text"])
    if not all(any(agree(n, s) for s in stated) for n in c["numbers"]):
        return False
    if not unit["whole"] and here & MARKERS - set(need):  # "male: 4,100,000" is not the population
        return False
    for r in relations:  # a field "Languages" says "language" by itself
        if r["strict"] and unit["field"] in r["fields"][:1]:
            here |= {w for m in re.finditer(rf"(?:{r['says']})\w*", c["text"], I) for w in words(m[0])}
    solid = names or c["numbers"] or any(r["strict"] for r in relations)
    missing = [w for w in need if w not in here and not (w in VAGUE and solid)]
    opening = words(c["text"].split()[0])  # the subject, where it is not the topic
    return not any(w in MUST or w in opening for w in missing) and len(missing) <= len(need) // 4


def check_part(claim, page):
    """(label, units that carry it) of one part of a claim; IR when it says nothing that could be checked."""
    c = parse(claim, page["topic"], page["titles"])
    names = [n for n in c["names"] if not set(n.split()) <= page["own"]]
    need = [w for w in c["content"] if w not in page["own"]]
    if not (names or need or c["numbers"] or c["sides"]):
        return ("NS" if c["names"] else "IR"), []
    relations = relations_of(claim, page)
    fields = {field for r in relations for field in r["fields"]}
    if c["names"] and not names and any(r["strict"] for r in relations):
        return "NS", []  # "Peru is a member of Peru"
    if not (fields or c["numbers"] or set(need) - VAGUE):
        fields = {"Location", "Map references", "Geography - note"}  # a bare "X is in Y"
    abroad = [n for n in names if n in page["countries"] or SEA.search(n)]
    parts = PARTS.search(claim) and not (relations and relations[0]["name"] == "neighbour")
    inside = any(re.search(rf"\bin (?:the )?{n}\b", normal(c["text"])) for n in abroad)
    for unit in page["units"]:
        if unit["field"] in fields if fields else unit["field"] not in ("neighbour", "side"):
            if parts and abroad and not PARTS.search(unit["text"]):
                continue  # a neighbour or a sea is no part, unless it is said to be
            if inside and (re.search(r"\bborder", unit["text"]) or any(n in page["countries"] for n in abroad)):
                continue  # "in the Baltic Sea" is not "bordering the Baltic Sea"
            if unit["whole"] and c["numbers"]:
                continue  # each number of a list belongs to its own segment
            if carried(unit, c, names, need, relations):
                return "S", [unit]
    return "NS", []


def check(claim, page):
    """Is the claim carried by the page (read_page)? -> (label, passages that carry it).

    Every part must be; a part that is only praise is passed over beside one that can be checked, and one that
    says nothing always. S, NS, or IR: no part says anything.
    """
    parts = facts(claim, page["topic"])
    judged = [(check_part(p, page), kind_of(p, page["topic"])) for p in (parts if len(parts) > 1 else [claim])]
    judged = [(verdict, kind) for verdict, kind in judged if verdict[0] != "IR"]
    solid = [verdict for verdict, kind in judged if kind != "vague"] or [verdict for verdict, _ in judged]
    if not solid:
        return "IR", []
    label = "S" if all(label == "S" for label, _ in solid) else "NS"
    return label, [unit["passage"] for _, units in solid for unit in units]


def fact_key(text, topic):
    """What a fact says, as a set of normal forms without the topic's own words: repeats share it."""
    return frozenset(words(text)) - {"is", "also", *words(topic)}
