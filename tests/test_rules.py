"""rules.py, 02 and 03 against pysbd, a brute-force BM25+, people's labels and a reader's answers.

What a reader expects and today's rules miss is marked: missed(...) is an xfail(strict), so a rule
that learns one of them makes the suite fail until its mark is taken off."""
import math
import re
import sys
from collections import Counter

import pytest
from conftest import ROOT, call, read_rows, stage, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import rules

decomposer = stage("02_decompose")
verifier = stage("03_verify")


def missed(*case):
    """A case that a reader expects and the rules do not manage yet."""
    return pytest.param(*case, marks=pytest.mark.xfail(strict=True, reason="not learnt yet"))


# ---------------------------------------------------------------------------------------------
# sentences

def cut(text):
    return [text[start:end] for start, end in rules.sentences(text)]


LIKE_PYSBD = [
    "Peru is a country in South America. Its capital is Lima.",
    "J. K. Rowling wrote it. She lives in Scotland.",
    "The novelist J. R. R. Tolkien was born in South Africa. He moved to England.",
    "Kofi A. Annan was born in Ghana. He led the UN.",
    "The growth rate was 2.5%. Inflation fell to 1.9%.",
    "Mt. Everest is 8,848.86 m high. It lies in Nepal.",
    "It gained independence in 1821. 3 years later it won.",
    "It was ruled by Spain (1532-1821). Then it was free.",
    "Dr. Smith and Mrs. Jones met Prof. Lee. They talked.",
    "The president, Gen. Juan Velasco, took power in 1968. He was removed in 1975.",
    "The U.S. dollar is used in Ecuador. It replaced the sucre.",
    "It joined the U.N. in 1945. It left in 1950.",
    "The capital is Washington, D.C. and the largest city is New York. It is a republic.",
    "At 5 p.m. the sun sets. At 6 a.m. it rises.",
    "The town was founded on Jan. 5, 1821. It grew.",
    "The treaty was signed on 3 Aug. 1921. It held.",
    "It exports fruit, e.g. bananas. It imports oil, i.e. petroleum.",
    "It grows fruit (e.g. bananas, mangoes, etc.) in the south. It exports them.",
    "The company, Southern Copper Corp., mines copper. It is large.",
    "Its No. 1 export is copper. Its no. 2 export is gold.",
    "Bolivia vs. Peru is a classic. Peru won 3-1.",
    "Visit www.peru.travel for more. It is good.",
    "Is Peru landlocked? No! It has a coast.",
    "The population is 34 million!! Amazing!!!",
    "Really?! Yes.",
    "Wait... what is this? It is Peru.",
    "She said, \"Peru is beautiful.\" Then she left.",
    "He asked \"Where is Lima?\" and left. Nobody knew.",
    "\u201cPeru is big.\u201d It is true.",
    "Peru's motto is 'Firm and Happy for the Union.' It dates from 1825.",
    "Peru (officially the Republic of Peru) is large. (It has 25 regions.) It is old.",
    "1. Peru is a country.\n2. Lima is its capital.",
    "a) Peru is large.\nb) Lima is its capital.",
    "- Peru is a country.\n- Lima is its capital.",
    "* Peru\n* Chile\n* Bolivia",
    "# Geography\nPeru is in South America.\n\nIt is large.",
    "**Peru** is a country. *It* is large.",
    "Peru is a country. \U0001F1F5\U0001F1EA It is nice.",
    "The Japanese name is \u65e5\u672c. It means origin of the sun.",
    "  Leading blanks. Trailing blanks.  ",
    "First line.\r\nSecond line.\r\n",
]
UNLIKE_PYSBD = {  # pysbd breaks after c., sq., approx. and km.; it does not break after an ellipsis
    "He was born c. 1907 in Lima. He died in 1980.":
        ["He was born c. 1907 in Lima.", "He died in 1980."],
    "It covers 1,285,216.5 sq. km of land. That is a lot.":
        ["It covers 1,285,216.5 sq. km of land.", "That is a lot."],
    "It covers approx. 1.3 million acres. It is small.":
        ["It covers approx. 1.3 million acres.", "It is small."],
    "The island lies 5 km. from the coast. It is small.":
        ["The island lies 5 km. from the coast.", "It is small."],
    "Peru is big\u2026 It is also old.": ["Peru is big\u2026", "It is also old."],
}


@pytest.fixture(scope="module")
def pysbd_cut():
    import pysbd
    segmenter = pysbd.Segmenter(language="en", clean=False, char_span=True)
    return lambda text: [span.sent.strip() for span in segmenter.segment(text)]


@pytest.mark.parametrize("text", LIKE_PYSBD)
def test_sentences_as_pysbd(text, pysbd_cut):
    assert cut(text) == pysbd_cut(text)


@pytest.mark.parametrize("text", UNLIKE_PYSBD)
def test_sentences_unlike_pysbd(text, pysbd_cut):
    assert cut(text) == UNLIKE_PYSBD[text] != pysbd_cut(text)


@pytest.mark.parametrize("text, expected", [
    ("\u79d8\u9c81\u5f88\u5927\u3002 Its capital is Lima.",
           ["\u79d8\u9c81\u5f88\u5927\u3002", "Its capital is Lima."]),
    missed("He lives in the U.S. She lives in Peru.",
           ["He lives in the U.S.", "She lives in Peru."]),
    missed("It covers 500 sq. km. It is the third largest.",
           ["It covers 500 sq. km.", "It is the third largest."])])
def test_sentences_as_a_reader(text, expected):
    assert cut(text) == expected


def covers(text):
    """Spans are ordered, disjoint, trimmed and hold every character that is no white space."""
    spans, end = rules.sentences(text), 0
    for start, stop in spans:
        assert not text[end:start].strip() and start < stop
        assert text[start:stop] == text[start:stop].strip()
        end = stop
    assert not text[end:].strip()


PIECES = st.sampled_from(["Peru", " is", " a", " Dr.", " 3.5", " U.S.", ". ", "? ", "...", "\u2026",
                          "\n", "\r\n", "1. ", "- ", "# ", "\"", "\u201d", ")", "(", " e.g.", "!",
                          "\u3002", "\U0001F600", "\u2028", "\u00a0", "\t", ", ", " c. 1907"])
TEXTS = st.one_of(st.text(max_size=120), st.lists(PIECES, max_size=40).map("".join))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXTS)
def test_sentences_lose_nothing(text):
    covers(text)


@pytest.mark.parametrize("text", [*LIKE_PYSBD, *UNLIKE_PYSBD, "", " \n ", ".", "...", "\x85a\x0bb"])
def test_sentences_lose_nothing_of_ours(text):
    covers(text)


# ---------------------------------------------------------------------------------------------
# facts

FACTS = """
Peru: Peru is a country in South America.
    Peru is a country in South America
Lesotho: Lesotho is a landlocked country in southern Africa.
    Lesotho is a landlocked country
    Lesotho is a country in southern Africa
Peru: It is a landlocked, mountainous country in South America.
    Peru is a landlocked country
    Peru is a mountainous country
    Peru is a country in South America
Cuba: Cuba is an island nation in the Caribbean.
    Cuba is an island nation
    Cuba is a nation in the Caribbean
Cuba: Cuba is a sovereign island nation in the Caribbean.
    Cuba is an island nation
    Cuba is a sovereign nation in the Caribbean
Peru: 1. Peru is a federal republic in South America.
    Peru is a federal republic
    Peru is a republic in South America
Peru: It is bordered by Ecuador and Colombia to the north, Brazil to the east, and Chile to the
        south.
    Peru is bordered by Ecuador to the north
    Peru is bordered by Colombia to the north
    Peru is bordered by Brazil to the east
    Peru is bordered by Chile to the south
Peru: It is bordered to the north by Ecuador, to the east by Brazil, and to the south by Chile.
    Peru is bordered by Ecuador to the north
    Peru is bordered by Brazil to the east
    Peru is bordered by Chile to the south
Peru: Peru is bordered by Ecuador, Brazil, and Chile.
    Peru is bordered by Ecuador
    Peru is bordered by Brazil
    Peru is bordered by Chile
Peru: It shares borders with Ecuador to the north and Brazil to the east.
    Peru shares borders with Ecuador to the north
    Peru shares borders with Brazil to the east
Peru: Peru is a country in South America, which is bordered by Brazil to the east.
    Peru is a country in South America
    Peru is bordered by Brazil to the east
Chad: Chad is a landlocked nation in Central Africa that is bordered by Libya to the north.
    Chad is a landlocked nation
    Chad is a nation in Central Africa
    Chad is bordered by Libya to the north
Croatia: It is bordered by Bosnia and Herzegovina to the southeast, and Serbia to the east.
    Croatia is bordered by Bosnia and Herzegovina to the southeast
    Croatia is bordered by Serbia to the east
New Zealand: New Zealand is bordered by the Tasman Sea to the west and the Pacific Ocean to the
        east.
    New Zealand is bordered by the Tasman Sea to the west
    New Zealand is bordered by the Pacific Ocean to the east
Benin: It is bordered by Togo to the west and the region of West Africa to the south.
    Benin is bordered by Togo to the west
    Benin is bordered by the region of West Africa to the south
? Peru: The country is surrounded by five countries, including Ecuador and Brazil.
    Peru is surrounded by five countries
    Peru is surrounded by Ecuador
    Peru is surrounded by Brazil
Peru: It is located in western South America, bordering the Pacific Ocean.
    Peru is located in western South America
    Peru borders the Pacific Ocean
Mali: Mali is a member of the African Union, ECOWAS and the Organisation of Islamic Cooperation.
    Mali is a member of the African Union
    Mali is a member of ECOWAS
    Mali is a member of the Organisation of Islamic Cooperation
Greece: It is a member of the Eurozone and a member of the European Union.
    Greece is a member of the Eurozone
    Greece is a member of the European Union
Peru: Peru is a member of the United Nations and a founding member of the Andean Community.
    Peru is a member of the United Nations
    Peru is a founding member of the Andean Community
Peru: Its main exports include copper, gold and fishmeal.
    Peru's main exports include copper
    Peru's main exports include gold
    Peru's main exports include fishmeal
Peru: It exports copper, gold, and fishmeal.
    Peru exports copper
    Peru exports gold
    Peru exports fishmeal
Peru: Peru, a country in South America, is bordered by Chile to the south.
    Peru is a country in South America
    Peru is bordered by Chile to the south
Peru: Its capital, Lima, is the largest city.
    Peru's capital is Lima
    Peru's capital is the largest city
Peru: Lima, the capital of Peru, is home to 10 million people.
    Lima is the capital of Peru
    Lima is home to 10 million people
Nepal: Nepal is a landlocked country in South Asia, nestled between India and China, with a
        population of approximately 2.2 million.
    Nepal is a landlocked country
    Nepal is a country in South Asia
    Nepal is nestled between India and China
    Nepal has a population of approximately 2.2 million
Peru: Peru is a country in South America with a population of about 34 million people.
    Peru is a country in South America
    Peru has a population of about 34 million people
Peru: It has a population of 34 million, and its capital is Lima.
    Peru has a population of 34 million
    Peru's capital is Lima
? Peru: The capital of Peru is Lima, and the currency is the sol.
    The capital of Peru is Lima
    The currency of Peru is the sol
Peru: It gained independence from Spain in 1821 and became a republic.
    Peru gained independence from Spain in 1821
    Peru became a republic
Hungary: Its capital is Budapest, and the country is bordered by Austria to the west.
    Hungary's capital is Budapest
    Hungary is bordered by Austria to the west
Egypt: It's bordered by the Red Sea to the east.
    Egypt is bordered by the Red Sea to the east
? Peru: Located in South America, Peru borders Chile to the south.
    Peru is located in South America
    Peru borders Chile to the south
Peru: The country's economy is based on agriculture and mining.
    Peru's economy is based on agriculture and mining
Peru: Additionally, the country has a coastline of 2,414 km.
    Peru has a coastline of 2,414 km
Peru: Peru is the third-largest country in South America.
    Peru is the third-largest country in South America
Brazil: Brazil is the second largest producer of beef.
    Brazil is the second largest producer of beef
Peru: Peru does not border Argentina.
    Peru does not border Argentina
Latvia: Latvia's terrain varies from plains to hills.
    Latvia's terrain varies from plains to hills
Peru: They speak Spanish and Quechua.
    The people of Peru speak Spanish and Quechua
Peru: What is the capital of Peru?
Peru: Here are three facts about Peru:
Peru: State facts about the country.
Peru: **Capital:** Lima
Peru: Yes, Peru.
Peru: ## Geography of Peru today
"""


def facts_table():
    """(topic, sentence, [fact]) of each entry: "Topic: sentence", then its facts, indented."""
    for entry in re.split(r"\n(?=\S)", FACTS.strip()):
        head, *facts = entry.replace("\n        ", " ").split("\n    ")
        topic, sentence = head.removeprefix("? ").split(": ", 1)
        yield (missed if head.startswith("? ") else pytest.param)(topic, sentence, facts)


@pytest.mark.parametrize("topic, sentence, expected", list(facts_table()))
def test_facts_of_a_reader(topic, sentence, expected):
    assert rules.facts(sentence, topic) == expected


WORDS = st.sampled_from([
    *"Peru It Its The country is has a the bordered by to north of and , . ; : ? Chile".split(),
    *"which with population member founding including capital ( ) - # * ' 34 million".split(),
    "landlocked", "island", "that", "they", "Brazil", ", and", "\n"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(TEXTS, st.lists(WORDS, max_size=30).map(" ".join)),
       st.sampled_from(["Peru", "Bosnia and Herzegovina", "C\u00f4te d'Ivoire", "a(b", ""]))
def test_facts_of_anything(text, topic):
    found = rules.facts(text, topic)
    assert all(len(fact.split()) >= 3 for fact in found) and len(set(found)) == len(found)


# ---------------------------------------------------------------------------------------------
# numbers and agree

@pytest.mark.parametrize("text, kind, value", [
    ("in 1991", "year", 1991), ("in 2004", "year", 2004), ("1,991 people", "count", 1991),
    ("34 million people", "count", 34e6), ("1.4 billion people", "count", 1.4e9),
    ("two thousand islands", "count", 2000), ("six countries", "count", 6),
    ("2,414 km", "length", 2414), ("1,500 miles", "length", 2413.5), ("6,746 m", "length", 6.746),
    ("2,000 metres", "length", 2), ("10,000 feet", "length", 3.048),
    ("52,300 sq km", "area", 52300), ("100 square miles", "area", 259),
    ("52,300 square kilometers", "area", 52300), ("100 hectares", "area", 1),
    ("18.2%", "share", 18.2), ("18.2 percent", "share", 18.2), ("18 per cent", "share", 18),
    ("half of them", "share", 50), ("two-thirds of them", "share", 66.7),
    ("a quarter of them", "share", 25), ("one in five", "share", 20),
    ("$48.2 billion", "money", 48.2e9), ("US$500", "money", 500),
    ("48 billion dollars", "money", 48e9),
    ("the third largest", "rank", 3), ("the 3rd largest", "rank", 3),
    ("the 21st state", "rank", 21),
    ("52,300 km\u00b2", "area", 52300), ("52,300 square km", "area", 52300),
    missed("twenty-one provinces", "count", 21),
])
def test_numbers(text, kind, value):
    (found,) = rules.numbers(text)
    assert found[0] == kind and found[1] == pytest.approx(value, rel=1e-3)


def test_numbers_of_a_phrase():
    found = rules.numbers("1 of 14 provinces lost 5% of 2 million people in 1999, the second time")
    assert [(kind, value) for kind, value, _ in found] == [
        ("count", 1), ("count", 14), ("share", 5), ("count", 2e6), ("year", 1999), ("rank", 2)]
    assert rules.numbers("one of the largest countries, Boeing747 and G7 aside") == []


@pytest.mark.parametrize("claimed, stated, expected", [
    ("in 1991", "in 1991", True), ("in 1991", "in 1992", False), ("in 2000", "2,000 people", False),
    ("six countries", "6 countries", True), ("six countries", "7 countries", False),
    ("20 provinces", "19 provinces", False), ("21 provinces", "20.5 provinces", True),
    ("the second largest", "the 2nd largest", True), ("the second", "the third", False),
    ("34 million people", "34,352,720 people", True), ("31 million people", "34,352,720", False),
    ("105 km", "100 km", True), ("106 km", "100 km", False), ("95 km", "100 km", True),
    ("94 km", "100 km", False), ("62 miles", "100 km", True), ("62 km", "62 sq km", False),
    ("20,200 square miles", "52,300 sq km", True), ("9,334 feet", "2,845 m", True),
    ("more than 10 million people", "12,300,000", True), ("over 10 million", "9,900,000", False),
    ("over 5 million people", "12,300,000", False),  # a bound far off
    ("less than 10 million people", "9,500,000", True),
    ("less than 10 million", "12,300,000", False),
    ("fewer than 10 million", "2,000,000", False), ("at least 10 million", "10,400,000", True),
    ("half of the people", "51.2%", True), ("half of the people", "58%", False),
    ("two-thirds", "66%", True), ("a quarter", "25%", True), ("50 km", "50%", False),
    ("$48 billion", "$48.2 billion", True), ("$48 million", "$48.2 billion", False),
    ("48 billion people", "$48.2 billion", False),
    ("48.2 billion US dollars", "$48.2 billion", True),
])
def test_numbers_agree(claimed, stated, expected):
    (one,), (other,) = rules.numbers(claimed), rules.numbers(stated)
    assert rules.agree(one, other) is expected


# ---------------------------------------------------------------------------------------------
# check, on the page of a country that no labelled claim is about

ENTRY = """
Background: Borduria was part of the Khemedian Empire until 1867, when it became an independent
  kingdom. Fighting between rival generals led to the end of the monarchy in 1938 and to a
  communist government that lasted until 1990. Syldavia occupied the eastern provinces during the
  war and left in 1946. Borduria joined the UN in 1955 and NATO in 2004. Elections in 2022 were
  the first in which a woman won the presidency.
Location: Southeastern Europe, bordering the Zilavian Sea, north of Syldavia, east of Ruritania
Map references: Europe
Area: total: 52,300 sq km; land: 46,100 sq km; water: 6,200 sq km
Land boundaries: total: 1,210 km; border countries: Grand Fenwick 95 km; Ruritania 310 km; South
  Borduria 420 km; Syldavia 385 km
Coastline: 340 km
Climate: temperate; cold, cloudy winters with frequent snow; hot, dry summers
Terrain: mostly mountains; fertile plains along the coast
Elevation: highest point: Mount Zlip 2,845 m; lowest point: Zilavian Sea 0 m; mean elevation: 612
  m
Natural resources: lignite, copper, timber, hydropower
Land use: agricultural land: 41.2% (2023 est.); forest: 33.5% (2023 est.); other: 25.3% (2023
  est.)
Population: total: 6,412,300 (2025 est.); male: 3,024,800; female: 3,387,500
Nationality: noun: Bordurian(s); adjective: Bordurian
Ethnic groups: Bordurian 82.1%, Syldavian 11.4%, Romani 3%, other 3.5% (2021 est.)
Languages: Languages: Bordurian (official) 84%, Syldavian 12%, other 4% (2021 est.)
Religions: Orthodox 71.3%, Muslim 18.2%, Roman Catholic 4.1%, none 6.4% (2021 est.)
Major urban areas - population: 720,000 SZOHOD (capital), 910,000 Travunje (2023)
Life expectancy at birth: total population: 73.2 years (2024 est.); male: 69.1 years; female: 79.4
  years
Country name: conventional long form: Republic of Borduria; conventional short form: Borduria;
  former: People's Republic of Borduria
Government type: parliamentary republic
Capital: name: Szohôd; geographic coordinates: 44 10 N, 22 40 E; time difference: UTC+2 (7 hours
  ahead of Washington, DC, during Standard Time)
Administrative divisions: 14 provinces; Hum, Klow, Travunje
Independence: 9 May 1867 (from the Khemedian Empire)
Executive branch: chief of state: President Irina SPONSZ (since 4 March 2022); head of government:
  Prime Minister Pavel TRAVUN (since 8 June 2023)
Legislative branch: legislature name: National Assembly; legislative structure: unicameral; number
  of seats: 140 (all directly elected)
International organization participation: BSEC, CE, EBRD, EU (candidate), FAO, G-77, IMF, NATO,
  OSCE, SCO (observer), UN, WHO, WTO
Economic overview: upper-middle-income European economy; services and tourism dominate; dependent
  on imported gas
GDP (official exchange rate): $48.2 billion (2024 est.); note: data in current dollars at official
  exchange rate
GDP - composition, by sector of origin: agriculture: 8.9% (2024 est.); industry: 24.3% (2024
  est.); services: 58.1% (2024 est.)
Unemployment rate: Unemployment rate 2024: 7.9% (2024 est.)
Youth unemployment rate (ages 15-24): total: 19.4% (2024 est.); male: 21.3% (2024 est.); female:
  16.8% (2024 est.)
Exports - partners: Germany 24%, Syldavia 18%, Italy 9% (2023); note: top five export partners
  based on percentage share of exports
Exports - commodities: copper, garments, wheat, wine, timber (2023); note: top five export
  commodities based on value in dollars
Imports - partners: China 21%, Germany 17%, Ruritania 8% (2023); note: top five import partners
  based on percentage share of imports
Imports - commodities: natural gas, cars, refined petroleum, packaged medicine (2023); note: top
  five import commodities based on value in dollars
Exchange rates: Currency: zlots (BOZ) per US dollar -; Exchange rates 2024: 5.12 (2024 est.)
"""
BORDURIA = [dict(zip(("title", "field", "text"), ("Borduria", *line.split(": ", 1))))
            for line in ENTRY.strip().replace("\n  ", " ").split("\n")]
TITLES = {"Borduria", "South Borduria", "Syldavia", "Ruritania", "Grand Fenwick", "Germany",
          "Italy", "China"}


def claims(block):
    """The lines of a block as cases; "? " before one that the rules miss, "# " before a heading."""
    lines = [line for line in block.strip().split("\n") if not line.startswith("# ")]
    return [missed(line[2:]) if line.startswith("? ") else line for line in lines]


TRUE = claims("""
Borduria is a country in Southeastern Europe
Borduria is located in the southeastern part of Europe
Borduria is a European country
Borduria is bordered by Syldavia to the south
Borduria is bordered by Ruritania to the west
Borduria lies north of Syldavia
Syldavia lies to the south of Borduria
Borduria shares a border with South Borduria
Borduria is bordered by Ruritania, Syldavia and South Borduria
Borduria borders four countries
Borduria is bordered by the Zilavian Sea
The capital of Borduria is Szohod
Szohôd is the capital city of Borduria
Borduria has a population of about 6.4 million people
Borduria is home to more than 6 million people
There are about 3.4 million women in Borduria
Borduria covers a total area of 52,300 square kilometers
Borduria covers about 20,200 square miles
Borduria has a land area of 46,100 square kilometres
Borduria has a coastline of 340 km
The highest point in Borduria is Mount Zlip
Mount Zlip is 2,845 meters high
Borduria is a mountainous country
About one third of Borduria is covered by forest
The official language of Borduria is Bordurian
The majority of the people of Borduria are Orthodox
Muslims make up 18% of the population of Borduria
Borduria has a predominantly Orthodox population
Women in Borduria have a life expectancy of 79.4 years
Borduria is a member of the United Nations
Borduria is a member of NATO and the World Trade Organization
Borduria joined NATO in 2004
Borduria is a parliamentary republic
Borduria gained independence from the Khemedian Empire in 1867
Borduria became independent in 1867
? Borduria was formerly called the People's Republic of Borduria
The currency of Borduria is the zlot
Borduria is divided into 14 provinces
The parliament of Borduria is unicameral and has 140 seats
The president of Borduria is Irina Sponsz
Borduria exports copper and wine
Borduria exports goods to Germany
Borduria imports refined petroleum
The unemployment rate in Borduria is 7.9 percent
? Borduria has a GDP of $48.2 billion
? Agriculture accounts for 8.9% of the GDP of Borduria
Borduria has a temperate climate with cold winters and hot summers
The natural resources of Borduria include copper and timber
? Borduria is not landlocked
""")
FALSE = claims("""
# directions
Borduria is bordered by Syldavia to the north
Borduria lies south of Syldavia
Borduria is bordered by Ruritania to the east
Borduria is bordered by Grand Fenwick to the west
Borduria is bordered by the Zilavian Sea to the south
Borduria is located in Northeastern Europe
# neighbours and seas as parts, places and borders
Borduria includes the regions of Syldavia and Ruritania
Borduria consists of South Borduria and Grand Fenwick
Borduria is home to the Zilavian Sea
Borduria is located in the Zilavian Sea
Borduria is located in Syldavia
Borduria is part of Ruritania
Borduria shares a maritime border with Syldavia
Borduria is bordered by Germany
Borduria borders five countries
Borduria is bordered by North Borduria
# the value of another line
Borduria has a population of 3,024,800
There are 3.4 million men in Borduria
Borduria covers a total area of 46,100 square kilometers
Borduria has a land area of 52,300 square kilometers
Women in Borduria have a life expectancy of 69.1 years
The unemployment rate in Borduria is 19.4 percent
About one third of Borduria is agricultural land
Muslims make up 71.3% of the population of Borduria
The lowest point in Borduria is Mount Zlip
The prime minister of Borduria is Irina Sponsz
Borduria exports refined petroleum
Borduria imports copper
Borduria exports goods to China
Borduria imports goods from Italy
# members
Borduria is a founding member of the United Nations
Borduria is a member of the European Union
Borduria is a member of the Shanghai Cooperation Organization
Borduria is a member of the G-20
South Borduria is a member of NATO
# years, places, institutions
? Borduria joined NATO in 1955
Borduria gained independence in 1938
Borduria gained independence from Syldavia in 1867
Borduria became a kingdom in 1938
The capital of Borduria is Travunje
? Szohod is the cultural capital of Borduria
The capital of South Borduria is Szohod
Szohod is the largest city in Borduria
Borduria is a parliamentary monarchy
Borduria is a communist country
The official language of Borduria is Syldavian
Most people in Borduria are Muslim
Only a minority of the people of Borduria are Orthodox
Borduria is the largest country in Southeastern Europe
# negation
Borduria is not a member of NATO
Borduria does not border Syldavia
Borduria has no coastline
Borduria is a landlocked country in Southeastern Europe
# numbers
Borduria has a population of 5.77 million people
Borduria has a coastline of 306 km
Borduria covers 52,300 square miles
Borduria has a GDP of $48.2 million
Mount Zlip is 2,845 feet high
Borduria has more than 7 million inhabitants
Borduria is divided into 140 provinces
About half of the people of Borduria are Orthodox
""")


@pytest.fixture(scope="module")
def borduria():
    return rules.read_page(BORDURIA, "Borduria", TITLES)


@pytest.mark.parametrize("claim", TRUE)
def test_check_true(claim, borduria):
    label, carriers = rules.check(claim, borduria)
    assert label == "S" and carriers and all(passage in BORDURIA for passage in carriers)


@pytest.mark.parametrize("claim", FALSE)
def test_check_false(claim, borduria):
    assert rules.check(claim, borduria)[0] == "NS"


@pytest.mark.parametrize("claim", [
    "Borduria is a sovereign state", "Borduria is a country", "Borduria is also a nation"])
def test_check_nothing_to_check(claim, borduria):
    assert rules.check(claim, borduria) == ("IR", [])


def test_check_praise_is_passed_over_beside_a_fact_but_is_no_fact(borduria):
    assert rules.check("Borduria is a beautiful country in Southeastern Europe", borduria)[0] == "S"
    assert rules.check("Borduria is known for its rich cultural heritage", borduria)[0] == "NS"


def test_check_every_part_must_be_carried(borduria):
    good, bad = "Borduria is a member of NATO", "a member of the European Union"
    label, carriers = rules.check(f"{good} and {bad}", borduria)
    assert label == "NS" and len(carriers) == 1
    label, carriers = rules.check(f"{good} and the UN", borduria)
    assert label == "S" and len(carriers) == 2


def test_check_of_an_element():
    """A number that names a thing is right or wrong, not nearly right (83 is bismuth)."""
    page = rules.read_page([{"title": "Polonium", "field": field, "text": text} for field, text in (
        ("Symbol", "Po"), ("Atomic number", "84"), ("Density", "9.2"))], "Polonium")
    one, two = rules.facts("Polonium is a chemical element with the symbol Po and an atomic number "
                           "of 84.", "Polonium")
    assert [rules.check(fact, page)[0] for fact in (one, two)] == ["S", "S"]
    assert rules.check("Polonium is a chemical element with the atomic number 84", page)[0] == "S"
    assert rules.check("Polonium has an atomic number of 83", page)[0] == "NS"
    assert rules.check("Polonium is a chemical element with the symbol P", page)[0] == "NS"


def test_check_never_joins_two_passages():
    page = [{"title": "X", "text": text}
            for text in ("Lake Wiz is 40 km long", "Lake Poo is 60 km long")]
    read = rules.read_page(page, "X", {"X"})
    assert rules.check("Lake Wiz is 40 km long", read) == ("S", page[:1])
    assert rules.check("Lake Wiz is 60 km long", read) == ("NS", [])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TEXTS, TEXTS)
def test_check_of_anything(claim, text):
    read = rules.read_page([{"title": "A", "text": text}], "A", {"A"})
    label, carriers = rules.check(claim, read)
    assert label in ("S", "NS", "IR") and (carriers or label != "S")


def test_parse():
    found = rules.parse("Borduria has 4 rivers and is bordered by South Borduria to the north",
                        "Borduria", TITLES)
    assert found["names"] == ["south borduria"] and found["sides"] == ["north"]
    assert [n[:2] for n in found["numbers"]] == [("count", 4)] and "river" in found["content"]
    found = rules.parse("The government of Borduria is led by Irina Sponsz", "Borduria")
    assert found["names"] == ["irina sponsz"] and not found["sides"] and not found["numbers"]


# ---------------------------------------------------------------------------------------------
# 02

def test_decompose_by_hand():
    text = "Peru is a country. It borders Chile.\n- Its capital is Lima."
    row = {"id": "peru/0", "topic": "Peru", "response": text, "finish": "stop"}
    assert decomposer.decompose(row) == {
        **row, "abstained": False,
        "sentences": [
            {"text": "Peru is a country.", "start": 0, "end": 18,
             "facts": [{"text": "Peru is a country"}]},
            {"text": "It borders Chile.", "start": 19, "end": 36,
             "facts": [{"text": "Peru borders Chile"}]},
            {"text": "- Its capital is Lima.", "start": 37, "end": 59,
             "facts": [{"text": "Peru's capital is Lima"}]}]}


@pytest.mark.parametrize("finish, facts", [("length", [1, 0]), ("stop", [1, 1])])
def test_decompose_takes_nothing_from_a_cut_sentence(finish, facts):
    row = decomposer.decompose({"topic": "Peru", "finish": finish,
                                "response": "Peru borders Chile. Peru has a coast of about"})
    assert [len(sentence["facts"]) for sentence in row["sentences"]] == facts
    assert row["sentences"][1]["text"] == "Peru has a coast of about" and not row["abstained"]


@pytest.mark.parametrize("thought", [
    "<think>Peru borders China. Is it so?</think>\n\n", " <think>\nHm.\n</think>", ""])
def test_decompose_passes_over_reasoning(thought):
    row = decomposer.decompose({"topic": "Peru", "finish": "stop",
                                "response": thought + "Peru borders Chile. It is big."})
    for s in row["sentences"]:
        assert row["response"][s["start"]:s["end"]] == s["text"] and s["start"] >= len(thought)
    assert [s["text"] for s in row["sentences"]] == ["Peru borders Chile.", "It is big."]


def test_decompose_unfinished_reasoning_says_nothing():
    row = decomposer.decompose({"topic": "Peru", "finish": "length",
                                "response": "<think>Peru borders Chile. Peru is"})
    assert row["sentences"] == [] and row["abstained"]


@pytest.mark.parametrize("response, abstained", [
    ("I'm sorry, but I do not know this country.", True),
    ("I\u2019m sorry, I can\u2019t help.", True),
    ("As an AI language model, I cannot say.", True), ("I cannot answer this. Peru is big.", True),
    ("I don't have information about Peru.", True), ("", True), (" \n", True),
    ("Peru is a country. I am sure.", False), ("Peru is a sorry sight to see.", False)])
def test_decompose_abstentions(response, abstained):
    row = decomposer.decompose({"topic": "Peru", "response": response, "finish": "stop"})
    assert row["abstained"] is abstained
    assert not (abstained and any(s["facts"] for s in row["sentences"]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TEXTS, st.sampled_from(["stop", "length"]))
def test_decompose_offsets_index_the_response(text, finish):
    row = decomposer.decompose({"topic": "Peru", "response": text, "finish": finish})
    assert all(text[s["start"]:s["end"]] == s["text"] for s in row["sentences"])


# ---------------------------------------------------------------------------------------------
# 03: evidence

def bm25_plus(query, documents, k1=1.5, b=0.75, delta=1.0, everywhere=True):
    """Lv & Zhai 2011, Eq. 5 and its idf log((N + 1) / df); query and documents are lists of words.

    The paper adds delta where a document holds the word; rank_bm25 0.2.2 adds it everywhere."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            df = sum(word in other for other in documents)
            tf = document.count(word)
            if df and (tf or everywhere):
                length = 1 - b + b * len(document) / mean
                score += math.log((len(documents) + 1) / df) * (
                    delta + tf * (k1 + 1) / (k1 * length + tf))
        scores.append(score)
    return scores


def best_first(scores):
    return sorted(range(len(scores)), key=lambda i: (-round(scores[i], 9), i))


@pytest.mark.parametrize("query", [
    "Borduria exports copper", "The capital of Borduria is Szohod", "male population in 2025",
    "Mount Zlip, the highest point, lies in Ruritania", "official, official language", "nothing"])
def test_rank_passages_by_brute_force(query):
    documents = [rules.words(f"{p['field']} {p['text']}") for p in BORDURIA]
    page = verifier.indexed(BORDURIA)
    scores = bm25_plus(rules.words(query), documents)
    assert page["index"].get_scores(rules.words(query)) == pytest.approx(scores)
    ranked = verifier.rank_passages(query, page, 5)
    assert ranked == [BORDURIA[i] for i in best_first(scores)[:5]]


def test_rank_bm25_departs_from_the_paper():
    """A delta for every document moves no rank: the package orders as plain BM25 (delta 0) does."""
    copper_only, both = ["copper"] * 6, ["copper", "gold", *["of"] * 60]
    documents, query = [copper_only, both, ["gold"], ["of"], ["of"]], ["copper", "gold"]
    plain = bm25_plus(query, documents, delta=0)
    assert best_first(bm25_plus(query, documents)) == best_first(plain)
    assert best_first(bm25_plus(query, documents, everywhere=False)) != best_first(plain)


def test_two_passages_tie_under_okapi_only():
    """FActScore's trap: on a page of two, a word of one passage has idf log(1.5 / 1.5) = 0."""
    from rank_bm25 import BM25Okapi
    page = [{"title": "X", "text": "it has hills"}, {"title": "X", "text": "it exports copper"}]
    words = [rules.words(p["text"]) for p in page]
    assert len(set(BM25Okapi(words).get_scores(["copper"]))) == 1
    assert verifier.rank_passages("copper", verifier.indexed(page), 1) == [page[1]]


def test_rank_passages_ties_keep_the_order_of_the_page():
    page = [{"title": "X", "text": text} for text in ("a b", "gold", "silver", "gold", "")]
    found = verifier.indexed(page)
    assert verifier.rank_passages("gold", found, 9) == [page[i] for i in (1, 3, 0, 2, 4)]
    assert verifier.rank_passages("zinc", found, 2) == page[:2]


def test_rank_passages_of_an_empty_page():
    page = [{"title": "X", "text": ""}, {"title": "X", "text": "\u65e5\u672c"}]
    assert verifier.rank_passages("gold", verifier.indexed(page), 3) == page


# ---------------------------------------------------------------------------------------------
# 03: verdicts

@pytest.mark.parametrize("claim, kind", [
    ("Peru borders Chile", "border"), ("Peru is surrounded by Chile and Brazil", "border"),
    ("Peru is bordered by Chile to the south", "direction"),
    ("Peru lies north of Chile", "direction"),
    ("Chile lies to the south of Peru", "direction"),
    ("The capital of Peru is Lima", "capital"), ("Lima is the capital city of Peru", "capital"),
    ("Peru is a member of the United Nations", "membership"),
    ("Peru joined the United Nations in 1945", "membership"),
    ("Peru has a population of 34 million", "number"),
    ("Peru gained independence in 1821", "number"),
    ("Peru is the third largest country in South America", "number"),
    ("Peru is a country in South America", "region"), ("Peru is an African nation", "region"),
    ("Peru is located in the Andes", "place"), ("Peru lies off the coast of Chile", "place"),
    ("Peru has a rich history and a vibrant culture", "vague"),
    ("Peru exports copper", "other"), ("The official language of Peru is Spanish", "other")])
def test_kind_of(claim, kind):
    assert verifier.kind_of(claim, "Peru") == kind


def facts_row(name, topic, *claims):
    """A row of 02's: each claim is a sentence and its only fact."""
    sentences = [{"text": claim, "start": 0, "end": len(claim), "facts": [{"text": claim}]}
                 for claim in claims]
    return {"id": name, "topic": topic, "response": claims[0], "sentences": sentences,
            "abstained": False}


def only_facts(rows):
    return [sentence["facts"][0] for row in rows for sentence in row["sentences"]]


@pytest.fixture
def verify(tmp_path, monkeypatch):
    """03 as a user runs it: verify(rows, *flags) -> (exit status, its rows, claims it judged)."""
    corpus = write_rows(tmp_path / "corpus.jsonl", BORDURIA + [
        {"title": "Syldavia", "field": "Coastline", "text": "0 km (landlocked)"}])
    out = tmp_path / "verified.jsonl"

    def run(rows, *flags):
        judged, check = [], rules.check
        facts = write_rows(tmp_path / "facts.jsonl", rows)
        monkeypatch.setattr(rules, "check", lambda *args: judged.append(args[0]) or check(*args))
        monkeypatch.setattr(sys, "argv", ["03_verify.py", "--in", str(facts), "--out", str(out),
                                          "--corpus", str(corpus), *flags])
        return verifier.main(), read_rows(out), judged
    return run


def test_verify_adds_to_facts_only(verify):
    rows = [facts_row("b/0", "Borduria", "Borduria borders Syldavia", "Borduria borders Germany"),
            facts_row("b/1", "Borduria", "Borduria is a country")]
    rows[0]["sentences"][0]["facts"][0]["human"] = "S"
    status, found, _ = verify(rows)
    assert status == 0
    good, bad, nothing = only_facts(found)
    assert good == {
        "text": "Borduria borders Syldavia", "human": "S", "label": "S", "kind": "border",
        "evidence": [{**p, "found": "title"} for p in BORDURIA if p["field"] == "Land boundaries"]}
    assert bad["label"] == "NS" and len(bad["evidence"]) == 3 and nothing["label"] == "IR"
    for fact in only_facts(found):
        for field in ("label", "kind", "evidence"):
            del fact[field]
    assert found == rows


def test_verify_judges_identical_claims_once(verify):
    same = "The coastline is 340 km long"
    rows = [facts_row(f"b/{k}", "Borduria", same, same) for k in range(3)]
    status, found, judged = verify([*rows, facts_row("s/0", "Syldavia", same)])
    assert status == 0 and judged == [same, same]  # once a topic
    assert [fact["label"] for fact in only_facts(found)] == ["S"] * 6 + ["NS"]


def test_verify_topic_without_a_page(verify):
    rows = [facts_row("a/0", "Atlantis", "Atlantis borders Syldavia"),
            facts_row("b/0", "borduria", "Borduria borders Syldavia")]
    status, found, judged = verify(rows)
    lost, kept = only_facts(found)
    assert status == 1 and judged == ["Borduria borders Syldavia"] and kept["label"] == "S"
    assert lost == {"text": "Atlantis borders Syldavia", "label": None, "kind": "border",
                    "evidence": []}


def test_verify_open_search(verify):
    rows = [facts_row("a/0", "Atlantis", "Borduria joined NATO in 2004", "It joined NATO in 2005")]
    status, found, _ = verify(rows, "--open-search")
    good, bad = only_facts(found)
    assert status == 0 and (good["label"], bad["label"]) == ("S", "NS")
    assert good["evidence"] == [{**p, "found": "search"} for p in BORDURIA
                                if p["field"] == "Background"]


# ---------------------------------------------------------------------------------------------
# 03 against people's labels: a floor under what RESULTS.md reports

@pytest.fixture(scope="module")
def judged_claims(tmp_path_factory):
    """[(half, kind, human says S, 03 says S)] of tests/labelled_claims.jsonl."""
    out = tmp_path_factory.mktemp("labels") / "verified.jsonl"
    done = call("03_verify.py", "--in", ROOT / "tests/labelled_claims.jsonl", "--out", out)
    assert done.returncode == 0, done.stderr
    return [(row["half"], fact["kind"], fact["human"] == "S", fact["label"] == "S")
            for row in read_rows(out) for s in row["sentences"] for fact in s["facts"]]


def written_by_models(claims):
    return [claim for claim in claims if claim[0] in ("base", "cool", "tuned")]


def accuracy(claims):
    return sum(human == ours for *_, human, ours in claims) / len(claims)


def kappa(claims):
    """Cohen 1960: (p_o - p_e) / (1 - p_e), p_e by the two margins."""
    n = len(claims)
    human = Counter(human for *_, human, _ in claims)
    ours = Counter(ours for *_, ours in claims)
    chance = sum(human[label] / n * ours[label] / n for label in (True, False))
    return (accuracy(claims) - chance) / (1 - chance)


def test_agreement_on_what_models_write(judged_claims):
    claims = written_by_models(judged_claims)
    assert len(claims) >= 400
    assert accuracy(claims) >= 0.90 and kappa(claims) >= 0.75


@pytest.mark.parametrize("kind", [
    "border", "direction", "number", "region", "capital", "membership", "other",
    missed("vague"), missed("place")])
def test_agreement_of_each_kind(judged_claims, kind):
    """Balanced accuracy, where a kind has 20 claims and 5 of them S."""
    claims = [claim for claim in written_by_models(judged_claims) if claim[1] == kind]
    true = [claim for claim in claims if claim[2]]
    false = [claim for claim in claims if not claim[2]]
    if len(claims) >= 20 and len(true) >= 5:
        assert (accuracy(true) + accuracy(false)) / 2 >= 0.75


def test_agreement_on_adversarial_claims(judged_claims):
    hard = [claim for claim in judged_claims if claim[0] == "hard"]
    assert len(hard) >= 100 and accuracy(hard) >= 0.60
