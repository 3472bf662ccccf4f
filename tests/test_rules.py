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
    missed("\u79d8\u9c81\u5f88\u5927\u3002 Its capital is Lima.",
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
                          "\u3002", "\U0001F600", "\u2028", "\u00a0", "\t", " and", ", ", " c. 1907"])
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

FACTS = [  # topic, sentence, the facts that a reader takes from it
    ("Peru", "Peru is a country in South America.", ["Peru is a country in South America"]),
    ("Lesotho", "Lesotho is a landlocked country in southern Africa.",
     ["Lesotho is a landlocked country", "Lesotho is a country in southern Africa"]),
    ("Peru", "It is a landlocked, mountainous country in South America.",
     ["Peru is a landlocked country", "Peru is a mountainous country",
      "Peru is a country in South America"]),
    ("Cuba", "Cuba is an island nation in the Caribbean.",
     ["Cuba is an island nation", "Cuba is a nation in the Caribbean"]),
    ("Cuba", "Cuba is a sovereign island nation in the Caribbean.",
     ["Cuba is an island nation", "Cuba is a sovereign nation in the Caribbean"]),
    ("Peru", "1. Peru is a federal republic in South America.",
     ["Peru is a federal republic", "Peru is a republic in South America"]),
    # borders
    ("Peru", "It is bordered by Ecuador and Colombia to the north, Brazil to the east, and Chile "
     "to the south.",
     ["Peru is bordered by Ecuador to the north", "Peru is bordered by Colombia to the north",
      "Peru is bordered by Brazil to the east", "Peru is bordered by Chile to the south"]),
    ("Peru", "It is bordered to the north by Ecuador, to the east by Brazil, and to the south by "
     "Chile.",
     ["Peru is bordered by Ecuador to the north", "Peru is bordered by Brazil to the east",
      "Peru is bordered by Chile to the south"]),
    ("Peru", "Peru is bordered by Ecuador, Brazil, and Chile.",
     ["Peru is bordered by Ecuador", "Peru is bordered by Brazil", "Peru is bordered by Chile"]),
    ("Peru", "It shares borders with Ecuador to the north and Brazil to the east.",
     ["Peru shares borders with Ecuador to the north", "Peru shares borders with Brazil to the east"]),
    ("Peru", "Peru is a country in South America, which is bordered by Brazil to the east.",
     ["Peru is a country in South America", "Peru is bordered by Brazil to the east"]),
    ("Chad", "Chad is a landlocked nation in Central Africa that is bordered by Libya to the north.",
     ["Chad is a landlocked nation", "Chad is a nation in Central Africa",
      "Chad is bordered by Libya to the north"]),
    ("Croatia", "It is bordered by Bosnia and Herzegovina to the southeast, and Serbia to the east.",
     ["Croatia is bordered by Bosnia and Herzegovina to the southeast",
      "Croatia is bordered by Serbia to the east"]),
    ("New Zealand", "New Zealand is bordered by the Tasman Sea to the west and the Pacific Ocean to "
     "the east.", ["New Zealand is bordered by the Tasman Sea to the west",
                   "New Zealand is bordered by the Pacific Ocean to the east"]),
    ("Benin", "It is bordered by Togo to the west and the region of West Africa to the south.",
     ["Benin is bordered by Togo to the west",
      "Benin is bordered by the region of West Africa to the south"]),
    ("Peru", "The country is surrounded by five countries, including Ecuador and Brazil.",
     ["Peru is surrounded by five countries", "Peru is surrounded by Ecuador",
      "Peru is surrounded by Brazil"]),
    ("Peru", "It is located in western South America, bordering the Pacific Ocean.",
     ["Peru is located in western South America", "Peru borders the Pacific Ocean"]),
    # memberships
    ("Mali", "Mali is a member of the African Union, ECOWAS and the Organisation of Islamic "
     "Cooperation.",
     ["Mali is a member of the African Union", "Mali is a member of ECOWAS",
      "Mali is a member of the Organisation of Islamic Cooperation"]),
    ("Greece", "It is a member of the Eurozone and a member of the European Union.",
     ["Greece is a member of the Eurozone", "Greece is a member of the European Union"]),
    ("Peru", "Peru is a member of the United Nations and a founding member of the Andean Community.",
     ["Peru is a member of the United Nations",
      "Peru is a founding member of the Andean Community"]),
    # lists
    ("Peru", "Its main exports include copper, gold and fishmeal.",
     ["Peru's main exports include copper", "Peru's main exports include gold",
      "Peru's main exports include fishmeal"]),
    ("Peru", "It exports copper, gold, and fishmeal.",
     ["Peru exports copper", "Peru exports gold", "Peru exports fishmeal"]),
    # appositions and clauses
    ("Peru", "Peru, a country in South America, is bordered by Chile to the south.",
     ["Peru is a country in South America", "Peru is bordered by Chile to the south"]),
    ("Peru", "Its capital, Lima, is the largest city.",
     ["Peru's capital is Lima", "Peru's capital is the largest city"]),
    ("Peru", "Lima, the capital of Peru, is home to 10 million people.",
     ["Lima is the capital of Peru", "Lima is home to 10 million people"]),
    ("Nepal", "Nepal is a landlocked country in South Asia, nestled between India and China, with a "
     "population of approximately 2.2 million.",
     ["Nepal is a landlocked country", "Nepal is a country in South Asia",
      "Nepal is nestled between India and China",
      "Nepal has a population of approximately 2.2 million"]),
    ("Peru", "Peru is a country in South America with a population of about 34 million people.",
     ["Peru is a country in South America", "Peru has a population of about 34 million people"]),
    ("Peru", "It has a population of 34 million, and its capital is Lima.",
     ["Peru has a population of 34 million", "Peru's capital is Lima"]),
    ("Peru", "The capital of Peru is Lima, and the currency is the sol.",
     ["The capital of Peru is Lima", "The currency of Peru is the sol"]),
    ("Peru", "It gained independence from Spain in 1821 and became a republic.",
     ["Peru gained independence from Spain in 1821", "Peru became a republic"]),
    ("Peru", "Located in South America, Peru borders Chile to the south.",
     ["Peru is located in South America", "Peru borders Chile to the south"]),
    ("Peru", "The country's economy is based on agriculture and mining.",
     ["Peru's economy is based on agriculture and mining"]),
    ("Peru", "Additionally, the country has a coastline of 2,414 km.",
     ["Peru has a coastline of 2,414 km"]),
    ("Peru", "Peru is the third-largest country in South America.",
     ["Peru is the third-largest country in South America"]),
    ("Brazil", "Brazil is the second largest producer of beef.",
     ["Brazil is the second largest producer of beef"]),
    ("Peru", "Peru does not border Argentina.", ["Peru does not border Argentina"]),
    ("Latvia", "Latvia's terrain varies from plains to hills.",
     ["Latvia's terrain varies from plains to hills"]),
    ("Peru", "They speak Spanish and Quechua.", ["The people of Peru speak Spanish and Quechua"]),
    # nothing
    ("Peru", "What is the capital of Peru?", []),
    ("Peru", "Here are three facts about Peru:", []),
    ("Peru", "State facts about the country.", []),
    ("Peru", "**Capital:** Lima", []),
    ("Peru", "Yes, Peru.", []),
    ("Peru", "## Geography of Peru today", []),
]


@pytest.mark.parametrize("topic, sentence, expected", FACTS)
def test_facts_of_a_reader(topic, sentence, expected):
    assert rules.facts(sentence, topic) == expected


WORDS = st.sampled_from("Peru It Its The country is has a the bordered by to north of and , . ; : ? and "
                        "Chile Brazil which with population member founding including capital ( ) "
                        "- # * ' 34 million landlocked island that they".split() + [", and", "\n"])


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
    ("$48.2 billion", "money", 48.2e9), ("US$500", "money", 500), ("48 billion dollars", "money", 48e9),
    ("the third largest", "rank", 3), ("the 3rd largest", "rank", 3), ("the 21st state", "rank", 21),
    missed("52,300 km\u00b2", "area", 52300), missed("twenty-one provinces", "count", 21),
])
def test_numbers(text, kind, value):
    (found,) = rules.numbers(text)
    assert found[0] == kind and found[1] == pytest.approx(value, rel=1e-3)


def test_numbers_of_a_phrase():
    found = rules.numbers("1 of the 14 provinces lost 5% of 2 million people in 1999, the second time")
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
    ("over 5 million people", "12,300,000", False),  # true, but no annotator grants it
    ("less than 10 million people", "9,500,000", True), ("less than 10 million", "12,300,000", False),
    ("fewer than 10 million", "2,000,000", False), ("at least 10 million", "10,400,000", True),
    ("half of the people", "51.2%", True), ("half of the people", "58%", False),
    ("two-thirds", "66%", True), ("a quarter", "25%", True), ("50 km", "50%", False),
    ("$48 billion", "$48.2 billion", True), ("$48 million", "$48.2 billion", False),
    ("48 billion people", "$48.2 billion", False), ("48.2 billion US dollars", "$48.2 billion", True),
])
def test_numbers_agree(claimed, stated, expected):
    (one,), (other,) = rules.numbers(claimed), rules.numbers(stated)
    assert rules.agree(one, other) is expected


# ---------------------------------------------------------------------------------------------
# check, on the page of a country that no labelled claim is about

BORDURIA = [{"title": "Borduria", "field": field, "text": text} for field, text in {
    "Background":
        "Borduria was part of the Khemedian Empire until 1867, when it became an independent kingdom. "
        "Fighting between rival generals led to the end of the monarchy in 1938 and to a communist "
        "government that lasted until 1990. Syldavia occupied the eastern provinces during the war "
        "and left in 1946. Borduria joined the UN in 1955 and NATO in 2004. Elections in 2022 were "
        "the first in which a woman won the presidency.",
    "Location": "Southeastern Europe, bordering the Zilavian Sea, north of Syldavia, east of Ruritania",
    "Map references": "Europe",
    "Area": "total: 52,300 sq km; land: 46,100 sq km; water: 6,200 sq km",
    "Land boundaries": "total: 1,210 km; border countries (4): Grand Fenwick 95 km; Ruritania 310 km; "
                       "South Borduria 420 km; Syldavia 385 km",
    "Coastline": "340 km",
    "Climate": "temperate; cold, cloudy winters with frequent snow; hot, dry summers",
    "Terrain": "mostly mountains; fertile plains along the coast",
    "Elevation": "highest point: Mount Zlip 2,845 m; lowest point: Zilavian Sea 0 m; "
                 "mean elevation: 612 m",
    "Natural resources": "lignite, copper, timber, hydropower",
    "Land use": "agricultural land: 41.2% (2023 est.); forest: 33.5% (2023 est.); "
                "other: 25.3% (2023 est.)",
    "Population": "total: 6,412,300 (2025 est.); male: 3,024,800; female: 3,387,500",
    "Nationality": "noun: Bordurian(s); adjective: Bordurian",
    "Ethnic groups": "Bordurian 82.1%, Syldavian 11.4%, Romani 3%, other 3.5% (2021 est.)",
    "Languages": "Languages: Bordurian (official) 84%, Syldavian 12%, other 4% (2021 est.)",
    "Religions": "Orthodox 71.3%, Muslim 18.2%, Roman Catholic 4.1%, none 6.4% (2021 est.)",
    "Major urban areas - population": "720,000 SZOHOD (capital), 910,000 Travunje (2023)",
    "Life expectancy at birth": "total population: 73.2 years (2024 est.); male: 69.1 years; "
                                "female: 79.4 years",
    "Country name": "conventional long form: Republic of Borduria; conventional short form: Borduria; "
                    "former: People's Republic of Borduria",
    "Government type": "parliamentary republic",
    "Capital": "name: Szoh\u00f4d; geographic coordinates: 44 10 N, 22 40 E; "
               "time difference: UTC+2 (7 hours ahead of Washington, DC, during Standard Time)",
    "Administrative divisions": "14 provinces; Hum, Klow, Travunje",
    "Independence": "9 May 1867 (from the Khemedian Empire)",
    "Executive branch": "chief of state: President Irina SPONSZ (since 4 March 2022); head of "
                        "government: Prime Minister Pavel TRAVUN (since 8 June 2023)",
    "Legislative branch": "legislature name: National Assembly; legislative structure: unicameral; "
                          "number of seats: 140 (all directly elected)",
    "International organization participation":
        "BSEC, CE, EBRD, EU (candidate), FAO, G-77, IMF, NATO, OSCE, SCO (observer), UN, WHO, WTO",
    "Economic overview": "upper-middle-income European economy; services and tourism dominate; "
                         "dependent on imported gas",
    "GDP (official exchange rate)": "$48.2 billion (2024 est.)",
    "GDP - composition, by sector of origin": "agriculture: 8.9% (2024 est.); "
                                              "industry: 24.3% (2024 est.); services: 58.1% (2024 est.)",
    "Unemployment rate": "Unemployment rate 2024: 7.9% (2024 est.)",
    "Youth unemployment rate (ages 15-24)": "total: 19.4% (2024 est.); male: 21.3% (2024 est.); "
                                            "female: 16.8% (2024 est.)",
    "Exports - partners": "Germany 24%, Syldavia 18%, Italy 9% (2023)",
    "Exports - commodities": "copper, garments, wheat, wine, timber (2023)",
    "Imports - partners": "China 21%, Germany 17%, Ruritania 8% (2023)",
    "Imports - commodities": "natural gas, cars, refined petroleum, packaged medicine (2023)",
    "Exchange rates": "Currency: zlots (BOZ) per US dollar -; Exchange rates 2024: 5.12 (2024 est.)",
}.items()]
TITLES = {"Borduria", "South Borduria", "Syldavia", "Ruritania", "Grand Fenwick", "Germany", "Italy",
          "China"}

TRUE = [
    "Borduria is a country in Southeastern Europe",
    "Borduria is located in the southeastern part of Europe",
    "Borduria is a European country",
    "Borduria is bordered by Syldavia to the south",
    "Borduria is bordered by Ruritania to the west",
    "Borduria lies north of Syldavia",
    "Syldavia lies to the south of Borduria",
    "Borduria shares a border with South Borduria",
    "Borduria is bordered by Ruritania, Syldavia and South Borduria",
    "Borduria borders four countries",
    "Borduria is bordered by the Zilavian Sea",
    "The capital of Borduria is Szohod",
    "Szoh\u00f4d is the capital city of Borduria",
    "Borduria has a population of about 6.4 million people",
    "Borduria is home to more than 6 million people",
    "There are about 3.4 million women in Borduria",
    "Borduria covers a total area of 52,300 square kilometers",
    "Borduria covers about 20,200 square miles",
    "Borduria has a land area of 46,100 square kilometres",
    "Borduria has a coastline of 340 km",
    "The highest point in Borduria is Mount Zlip",
    "Mount Zlip is 2,845 meters high",
    "Borduria is a mountainous country",
    "About one third of Borduria is covered by forest",
    "The official language of Borduria is Bordurian",
    "The majority of the people of Borduria are Orthodox",
    "Muslims make up 18% of the population of Borduria",
    "Borduria has a predominantly Orthodox population",
    "Women in Borduria have a life expectancy of 79.4 years",
    "Borduria is a member of the United Nations",
    "Borduria is a member of NATO and the World Trade Organization",
    "Borduria joined NATO in 2004",
    "Borduria is a parliamentary republic",
    "Borduria gained independence from the Khemedian Empire in 1867",
    "Borduria became independent in 1867",
    "Borduria was formerly called the People's Republic of Borduria",
    "The currency of Borduria is the zlot",
    "Borduria is divided into 14 provinces",
    "The parliament of Borduria is unicameral and has 140 seats",
    "The president of Borduria is Irina Sponsz",
    "Borduria exports copper and wine",
    "Borduria exports goods to Germany",
    "Borduria imports refined petroleum",
    "The unemployment rate in Borduria is 7.9 percent",
    "Borduria has a GDP of $48.2 billion",
    "Agriculture accounts for 8.9% of the GDP of Borduria",
    "Borduria has a temperate climate with cold winters and hot summers",
    "The natural resources of Borduria include copper and timber",
    "Borduria is not landlocked",
]
FALSE = [
    # directions
    "Borduria is bordered by Syldavia to the north",
    "Borduria lies south of Syldavia",
    "Borduria is bordered by Ruritania to the east",
    "Borduria is bordered by Grand Fenwick to the west",
    "Borduria is bordered by the Zilavian Sea to the south",
    "Borduria is located in Northeastern Europe",
    # neighbours and seas as parts, places and borders
    "Borduria includes the regions of Syldavia and Ruritania",
    "Borduria consists of South Borduria and Grand Fenwick",
    "Borduria is home to the Zilavian Sea",
    "Borduria is located in the Zilavian Sea",
    "Borduria is located in Syldavia",
    "Borduria is part of Ruritania",
    "Borduria shares a maritime border with Syldavia",
    "Borduria is bordered by Germany",
    "Borduria borders five countries",
    "Borduria is bordered by North Borduria",
    # the value of another line
    "Borduria has a population of 3,024,800",
    "There are 3.4 million men in Borduria",
    "Borduria covers a total area of 46,100 square kilometers",
    "Borduria has a land area of 52,300 square kilometers",
    "Women in Borduria have a life expectancy of 69.1 years",
    "The unemployment rate in Borduria is 19.4 percent",
    "About one third of Borduria is agricultural land",
    "Muslims make up 71.3% of the population of Borduria",
    "The lowest point in Borduria is Mount Zlip",
    "The prime minister of Borduria is Irina Sponsz",
    "Borduria exports refined petroleum",
    "Borduria imports copper",
    "Borduria exports goods to China",
    "Borduria imports goods from Italy",
    # members
    "Borduria is a founding member of the United Nations",
    "Borduria is a member of the European Union",
    "Borduria is a member of the Shanghai Cooperation Organization",
    "Borduria is a member of the G-20",
    "South Borduria is a member of NATO",
    # years, places, institutions
    "Borduria joined NATO in 1955",
    "Borduria gained independence in 1938",
    "Borduria gained independence from Syldavia in 1867",
    "Borduria became a kingdom in 1938",
    "The capital of Borduria is Travunje",
    "Szohod is the cultural capital of Borduria",
    "The capital of South Borduria is Szohod",
    "Szohod is the largest city in Borduria",
    "Borduria is a parliamentary monarchy",
    "Borduria is a communist country",
    "The official language of Borduria is Syldavian",
    "Most people in Borduria are Muslim",
    "Only a minority of the people of Borduria are Orthodox",
    "Borduria is the largest country in Southeastern Europe",
    # negation
    "Borduria is not a member of NATO",
    "Borduria does not border Syldavia",
    "Borduria has no coastline",
    "Borduria is a landlocked country in Southeastern Europe",
    # numbers
    "Borduria has a population of 5.77 million people",
    "Borduria has a coastline of 306 km",
    "Borduria covers 52,300 square miles",
    "Borduria has a GDP of $48.2 million",
    "Mount Zlip is 2,845 feet high",
    "Borduria has more than 7 million inhabitants",
    "Borduria is divided into 140 provinces",
    "About half of the people of Borduria are Orthodox",
]


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
