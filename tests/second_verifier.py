"""
A second verifier, independent of the first: is a gain the model's, or the checker's?

The Factbook's fields become typed values; a claim is read from left to right, and every word must
belong to a part it knows: all true -> "S", else "NS". An unknown word, or a part that the typed
values do not settle (a direction, a sea) -> null: never a guess. Of 03's rows it writes those facts
that it judges: DIR/<stem>.first.jsonl under the first label, DIR/<stem>.second.jsonl under its own.

  python tests/second_verifier.py --in base.jsonl tuned.jsonl --out-dir DIR
"""
import argparse
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import die, read_jsonl, write_whole  # noqa: E402

ALIASES = dict(pair.split("=") for pair in (
    "burma=myanmar;ivory coast=cote d'ivoire;uk=united kingdom;us=united states;macedonia=north "
    "macedonia;uae=united arab emirates;czech republic=czechia;holy see=vatican city;swaziland="
    "eswatini;democratic republic of congo=democratic republic of the congo").split(";"))
SIDE = r"(?:(?:north|south)[- ]?(?:east|west)|north|south|east|west|central)(?:ern)?\b"
AREA = r"(?:(?:north|south|central) america|middle east|africa|asia|europe|oceania|caribbean\b)"
OCEAN = r"(?:(?P<half>(?:north|south)(?:ern)?) )?(?P<sea>pacific|atlantic|indian|arctic)(?: ocean)?"
NUMBER = (r"(?:(?P<over>over|more than)|(?P<under>nearly|almost|just under|under)|about|around|"
          r"approximately|roughly|) ?(?P<n>\d[\d,]*(?:\.\d+)?)(?: (?P<unit>million|billion))?")
FAITHS = {"muslim": "muslim|islam", "hindu": "hindu", "buddhist": "buddh", "catholic": "catholic",
          "christian": "christian|catholic|protestant|orthodox|evangelic|pentecost|anglican|church|"
                       "methodist|lutheran|adventist|baptist|apostolic|jehovah|congregat|presbyter"}
FILLER = re.compile(
    r"(?:and|is|are|lies|with|that|which|also|an?|the|its?|has|,|country|nations?|state|territory|"
    r"nation-state|region|sovereign|independent|vibrant|diverse|known for|considered|recognized as|"
    r"(?:(?:primarily|mainly) )?(?:located|situated|nestled)(?: primarily| mainly)?)(?![\w'-])")


def fold(text):
    """Lower case; no accents, abbreviations in brackets, quotes around it, full stop."""
    text = unicodedata.normalize("NFKD", text.replace("’", "'"))
    text = re.sub(r" \([A-Z]{2,5}\)|[\u0300-\u036f]", "", text)
    return " ".join(text.lower().strip("\"' .").split())


def canon(name):
    return ALIASES.get(name := name.removeprefix("the "), name)


def side(text):
    """"North-eastern" -> "ne"; "central" -> "c"; none -> ""."""
    return "".join(w[0] for w in re.findall("north|south|east|west|central", text or ""))


def number(pattern, text):
    return float(found[1].replace(",", "")) if (found := re.search(pattern, text)) else None


def near(m, value):
    """LABELLING: within 5 % of the stated value; "more than 10 million" for 12.3 million."""
    n = float(m["n"].replace(",", "")) * {"million": 1e6, "billion": 1e9, None: 1}[m["unit"]]
    if not value or not m["over"] and not m["under"]:
        return abs(n - value) <= 0.05 * value if value else None
    low, high = (n, 1.25 * n) if m["over"] else (0.9 * n, n)
    return low <= value <= high or (None if 0.95 * low <= value <= 1.2 * high else False)


class Country:
    """The typed values of one entry, and a method for each kind of part: True, False or None."""

    def __init__(self, title, fields):
        entry = defaultdict(str, {name: fold(text) for name, text in fields.items()})
        self.title, self.entry = fold(title), " ; ".join(entry.values())
        borders = re.sub(r" \([^)]*\)", "", entry["Land boundaries"].split("; note")[0])
        self.land = set(map(canon, re.findall(r"(?:[:;,]| and) ([^;:,\d]+?) [\d,.]+ km", borders)))
        self.settled = "total: " in borders and "french guiana - total" not in borders
        self.where, self.coast, self.seat = entry["Location"], entry["Coastline"], entry["Capital"]
        island = bool(re.search(r"\b(?:islands?|archipelago|atolls?)\b", self.where))
        self.island = None if island == bool(self.land) else island
        head = re.sub("[,;].*|^met.*?: |-Central|^[a-z]+ (?=[A-Z])", "", fields.get("Location", ""))
        self.regions = {(side(s), a) for s, a in re.findall(rf"({SIDE} )?\b({AREA})", fold(head))}
        self.maps, self.tongues = entry["Map references"], entry["Languages"].split(": ", 1)[-1]
        self.people = number(r"^(?:total: )?([\d,]+) \(", entry["Population"])
        self.area = number(r"total: ([\d,.]+) sq", entry["Area"])
        seat = re.match(r"name: (?!no |admin)(.*?)(?=; (?:geo|note|time|ety)|$)", self.seat)
        self.capitals = set(re.split(r" ?\([^()]*\)[,;]? ?", seat[1] if seat else "")) - {""}
        self.official = {re.split(r" ?[\d<(]", t)[0] for t in re.split(
            r"[,;] (?![^(]*\))", self.tongues) if "(official" in t}
        faiths = re.sub(r"\([^()]*\)", "", re.split("; note|; less", entry["Religions"])[0])
        self.faiths = {re.split(r" ?[\d<]", f)[0]: number(r"([\d.]+)[^,]*%", f)
                       for f in re.split("[,;] ", faiths)}

    def border(self, m):
        """The list after "bordered by"; "surrounded by" wants all neighbours."""
        named = {canon(name) for name in re.findall(self.places, m["list"])}
        truths = [name in self.land or (False if self.settled else None) for name in named]
        if m["around"] and False not in truths:
            truths.append(named == self.land or None)
        return None if None in truths else all(truths)

    def ocean(self, m):
        """An island in this ocean; the wrong half of the right ocean is false."""
        half, known = (m["half"] or "").removesuffix("ern"), re.findall(
            rf"(?:(north|south) )?{m['sea']} ocean", self.where)
        if not self.island or half and "" in known:
            return None
        return (half in known or not half) if known else None if m["sea"] in self.entry else False

    def region(self, m):
        part, area, areas = side(m["side"]), m["area"], {a for _, a in self.regions}
        loose = not (m["prep"] or m["adjective"] or area == "caribbean")  # "Chad is Africa"
        if not areas or loose or part and "continent" in m[0]:
            return None
        if (part, area) in self.regions or not part and area in areas:
            return True
        doubt = (any(a == area and (not s or set(s) & set(part)) for s, a in self.regions)
                 or part in map(side, re.findall(rf"{SIDE}(?= {area})", self.entry))
                 or area not in areas and area in self.where + self.maps
                 or {area, *areas} <= {"north america", "central america", "caribbean"}
                 or area == "middle east" and area in self.entry
                 or area == "asia" and "middle east" in areas and part in ("", "w", "sw"))
        return None if doubt else False

    def among(self, m, known, field):
        """Capitals and official languages: the claim's names against the field's."""
        named = set(re.split(r",? and |, ", m["names"]))
        if named <= known:
            return True if named == known or m["one"] else None
        doubt = not known or re.search(r"\b(?:of|in|is|known|the|city|its|also)\b", m["names"])
        return None if doubt or any(w in field for n in named for w in n.split()) else False

    def faith(self, m):
        if None in self.faiths.values():
            return None
        mine = re.compile(FAITHS[m["faith"]] + "|christian" * (m["faith"] == "catholic"))
        rival = max(s for f, s in {**self.faiths, "": 0}.items() if not mine.search(f))
        share = sum(s for f, s in self.faiths.items() if re.search(FAITHS[m["faith"]], f))
        return True if share > 50 else False if rival > 50 and share < 45 else None

    def judge(self, claim):
        """(verdict, kinds of its parts); the verdict is True, False or None."""
        me, text, truths, kinds = rf"(?:the )?{re.escape(self.title)}", fold(claim), [], set()
        of = "(capital(?: city)?|population|area|official languages?)"
        for pattern, new in (
                (rf"(?:the )?{of} of {me} ", r"its \1 "), (rf"{me}'s? ", "its "),
                (rf"(.+) is ((?:an?|one of) |)(?:the )?{of} of {me}$", r"its \2\3 is \1"),
                (rf"(?:the )?(?:people|country|nation)(?: of)? {me} ", "it "),
                (rf"{me}(?: |, )", "it "), (rf"(?:the )?(?={of} is)", "its ")):
            text, done = re.subn("^" + pattern, new, text)
            if done:
                break
        while done and text:
            for kind, pattern, method in self.parts:
                if m := pattern.match(text):
                    truths, kinds = [*truths, method(self, m)], kinds | {kind}
                    break
            if not (m := m or FILLER.match(text)):
                return None, kinds
            text = text[m.end():].lstrip()
        return None if None in truths or not truths else all(truths), kinds


def load(corpus):
    """{folded title: Country}; names of countries in the patterns are the corpus' own."""
    fields = defaultdict(dict)
    for row in read_jsonl(corpus, {"title": str, "field": str, "text": str}):
        fields[row["title"]].setdefault(row["field"], row["text"])
    names = sorted({*map(fold, fields), *ALIASES}, key=len, reverse=True)
    Country.places = place = rf"(?:the )?(?:{'|'.join(map(re.escape, names))})(?![\w-])"
    Country.parts = [(kind, re.compile(p + r"(?![\w'%-])"), method) for kind, p, method in (
        ("borders", r"(?:(?P<around>surrounded by)|(?:bordered|bounded) by|borders?(?: with)?|"
         r"bordering|shares? (?:its |a )?(?:land )?borders? with) (?:several (?:other )?countries"
         rf",? including )?(?P<list>{place}(?:(?:, and |, | and |, as well as ){place})*)",
         Country.border),
        ("borders", "(?P<no>not )?(?:an? )?landlocked",
         lambda c, m: ("landlocked" in c.coast) != bool(m["no"]) if c.coast else None),
        ("borders", "island(?= nation| country| state|$)", lambda c, m: c.island),
        ("region", "an? continent", lambda c, m: c.title in ("australia", "antarctica")),
        ("region", "(?:(?:in|surrounded by) (?:the )?|(?=pacific (?:island )?nation))" + OCEAN,
         Country.ocean),
        ("region", r"(?P<prep>(?:, |(?:in|on|part of) )(?:the )?(?:(?:continent|region) of )?)?"
         r"(?!south african? |south africa$|central african rep|caribbean sea)"
         rf"(?:(?P<side>{SIDE})[ -](?:(?:part|region) of )?)?(?P<area>{AREA})"
         "(?P<adjective>a?n|ern)?(?: region| continent)?", Country.region),
        ("population", rf"(?:(?:total |estimated )?population (?:of|is|at)|home to) {NUMBER}"
         "(?: people| inhabitants| residents)?", lambda c, m: near(m, c.people)),
        ("area", rf"(?:covers |(?:covers )?(?:an? )?(?:total )?area (?:of|is) ){NUMBER} ?(?:km2|(?:"
         r"square|sq\.?) ?(?:km|kilomet(?:er|re)s|(?P<miles>mi(?:les)?)))",
         lambda c, m: near(m, c.area and c.area / (2.59 if m["miles"] else 1))),
        ("capital", r"(?P<one>a )?capital(?: city)?(?: (?:is|in|at|being|called|named))*[:,]? "
         "(?P<names>[^;:]+?)(?=$|, | and (?:has|is|its) )",
         lambda c, m: c.among(m, c.capitals, c.seat)),
        ("language", "(?P<one>one of |an )?official languages? (?:is|are) (?P<names>[^;:]+)$",
         lambda c, m: c.among(m, c.official, c.tongues)),
        ("religion", "(?:predominantly|mostly|mainly|largely) (?:roman )?(?P<faith>"
         + "|".join(FAITHS) + ")s?(?: population| majority)?", Country.faith))]
    return {fold(title): Country(title, entry) for title, entry in fields.items()}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--in", dest="inp", nargs="+", required=True, metavar="FILE", help="03's rows")
    p.add_argument("--out-dir", required=True, metavar="DIR", help="for two files of every FILE")
    p.add_argument("--corpus", default="data/world/countries.jsonl", metavar="FILE")
    return p.parse_args()


def main():
    args = parse_args()
    if len({Path(path).stem for path in args.inp}) < len(args.inp):
        die("--in: two files of one stem would write the same file")
    countries = load(args.corpus)
    for path in args.inp:
        rows, labels, table = read_jsonl(path, {"topic": str, "sentences": list}), {}, Counter()
        for row, fact in ((r, f) for r in rows for s in r["sentences"] for f in s["facts"]):
            country = countries.get(canon(fold(row["topic"])))
            verdict, kinds = country.judge(fact["text"]) if country else (None, ())
            table["all"] += 1
            if verdict is not None and fact.get("label", "") is not None:
                labels[id(fact)] = "S" if verdict else "NS"
                table.update([*kinds, f"first {fact.get('label')}, second {labels[id(fact)]}"])
        for name, keep in (("first", lambda f: f),
                           ("second", lambda f: f | {"label": labels[id(f)]})):
            write_whole(Path(args.out_dir, f"{Path(path).stem}.{name}.jsonl"), rows=[
                r | {"sentences": [s | {"facts": [keep(f) for f in s["facts"] if id(f) in labels]}
                                   for s in r["sentences"]]} for r in rows])
        print(f"{path}: judged {len(labels)} of {table.pop('all')} facts\n  "
              + "; ".join(f"{k}: {n}" for k, n in sorted(table.items())), file=sys.stderr)


if __name__ == "__main__":
    main()
