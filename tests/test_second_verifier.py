"""The second verifier: right answers read off the Factbook by hand, its two files, human labels."""
import json
import sys
from collections import Counter

import pytest
from conftest import ROOT, call, read_rows, write_rows

sys.path.insert(0, str(ROOT / "tests"))
import second_verifier  # noqa: E402

DRC = "Democratic Republic of the Congo"
CLAIMS = [  # topic, claim, what its entry settles: True, False or None
    ("Jordan", "Jordan borders Syria", True),
    ("Jordan", "Jordan is bordered by Iraq, Israel and Saudi Arabia", True),
    ("Jordan", "Jordan shares its borders with Syria and Lebanon", False),  # one of two is wrong
    ("Jordan", "Jordan is a landlocked country", False),  # coastline 26 km
    ("Jordan", "Jordan is not landlocked", True),
    ("Chad", "Chad is landlocked", True),
    ("Chad", "Chad is not a landlocked country", False),
    ("Niger", "Niger is bordered by Nigeria", True),
    ("Niger", "Niger is bordered by Niger", False),
    ("Nigeria", "Nigeria borders Niger", True),
    ("Nigeria", "Nigeria borders Guinea", False),
    ("Guinea", "Guinea borders Guinea-Bissau", True),
    ("Guinea", "Guinea borders Equatorial Guinea", False),
    ("Guinea", "Guinea borders Papua New Guinea", False),
    ("Guinea", "Guinea-Bissau borders Senegal", None),  # not a claim about Guinea
    ("Equatorial Guinea", "Equatorial Guinea borders Gabon", True),
    ("Republic of the Congo", "The Republic of the Congo borders Gabon", True),
    (DRC, "The Democratic Republic of the Congo borders Gabon", False),
    (DRC,
     "The Democratic Republic of the Congo (DRC) borders the Republic of the Congo", True),
    ("Republic of the Congo", "The Republic of the Congo borders the Congo", None),  # which one?
    ("North Korea", "North Korea borders South Korea", True),
    ("North Korea", "North Korea borders Japan", False),
    ("South Korea", "South Korea borders China", False),
    ("South Korea", "South Korea borders Korea", None),
    ("Liberia", "Liberia is bordered by the Ivory Coast", True),
    ("Gambia", "The Gambia is surrounded by Senegal", True),
    ("Suriname", "Suriname is surrounded by Brazil", None),  # one of three: annotators differ
    ("Suriname", "Suriname is surrounded by Chile", False),
    ("Suriname", "Suriname is bordered by Venezuela", False),
    ("San Marino", "San Marino is surrounded by Italy", True),
    ("Mongolia", "Mongolia is surrounded by China and Russia", True),
    ("Mongolia", "Mongolia shares borders with several countries, including Japan", False),
    ("Mongolia", "Mongolia shares borders with three countries", None),  # no count is typed
    ("Philippines", "The Philippines borders Malaysia", False),  # 0 km of land borders
    ("France", "France borders Brazil", None),  # the list leaves out French Guiana
    ("Jordan", "Jordan is bordered by Syria to the north", None),  # a direction is not typed
    ("Jordan", "Jordan is bordered by the Red Sea", None),
    ("Jordan", "Jordan borders Syria and is famous for Petra", None),
    ("Fiji", "Fiji is an island nation", True),
    ("Chad", "Chad is an island nation", False),
    ("Haiti", "Haiti is an island nation", None),  # on an island, with a land border
    ("Kenya", "Kenya is an East African country", True),
    ("Kenya", "Kenya is located in Africa", True),
    ("Kenya", "Kenya is located in West Africa", False),
    ("Kenya", "Kenya is located in South Africa", None),  # a country, not a region
    ("Cameroon", "Cameroon is a country in East Africa", False),
    ("Cameroon", "Cameroon is a country in West Africa", None),  # elsewhere its entry says so
    ("Jordan", "Jordan is a Middle Eastern country", True),
    ("Jordan", "Jordan is a country in Western Asia", None),
    ("Jordan", "Jordan is a country in Southeast Asia", False),
    ("Costa Rica", "Costa Rica is a country in North America", None),
    ("Costa Rica", "Costa Rica is a South American country", False),
    ("Georgia", "Georgia is a European country", None),  # its Location mentions Europe
    ("Nigeria", "Nigeria is a continent located in West Africa", False),
    ("Liberia", "Liberia is located in the continent of West Africa", None),
    ("Belarus", "Belarus is a nation located in the European continent", True),
    ("Tonga", "Tonga is a Pacific nation", True),
    ("Tonga", "Tonga is a nation in the North Pacific Ocean", False),
    ("Mauritius", "Mauritius is located in the Indian Ocean", True),
    ("Chad", "Chad is a landlocked country in Central Africa with a population of 20 million",
     True),
    ("Chad", "Chad is a landlocked country in Central Africa with a population of 2 million",
     False),
    ("Chad", "Chad is a small country in Central Africa", None),  # how small is small?
    ("Latvia", "Latvia is home to just under 1.9 million inhabitants", True),
    ("Latvia", "Latvia has a population of about 1.8 million people", True),  # within 5 %
    ("Latvia", "Latvia has a population of 1,700,000", False),
    ("Latvia", "Latvia's population is over 1.8 million", True),
    ("Latvia", "Latvia has a population of over 3 million", False),
    ("Latvia", "Latvia has a population of over 1.3 million", None),  # true, but too loose to call
    ("Latvia", "The population of Riga is 1.9 million", None),
    ("Latvia", "Latvia has about 1.9 million women", None),
    ("Latvia", "Latvia covers an area of about 65,000 square kilometers", True),
    ("Latvia", "Latvia covers about 25,000 square miles", True),
    ("Latvia", "Latvia has a total area of 25,000 km²", False),
    ("Latvia", "The capital of Latvia is Riga", True),
    ("Latvia", "Vilnius is the capital of Latvia", False),
    ("Latvia", "The largest city of Latvia is Riga", None),
    ("Latvia", "Latvia's capital and largest city is Riga", None),
    ("Latvia", "Riga was the capital of Latvia", None),
    ("Latvia", "Latvia has a capital city called Rigaa", False),
    ("Côte d'Ivoire", "Abidjan is a capital of Côte d'Ivoire", True),
    ("Côte d'Ivoire", "The capital of Côte d'Ivoire is Abidjan", None),  # one of two
    ("Côte d'Ivoire", "Côte d'Ivoire has its capital at Bouake", False),
    ("Nauru", "The capital of Nauru is Yaren", None),  # "no official capital"
    ("San Marino", "San Marino's capital city is San Marino", True),
    ("Nigeria", "The capital of Nigeria is Lagos", None),  # the field names it: its former capital
    ("Latvia", "The official language of Latvia is Latvian", True),
    ("Finland", "Swedish is an official language of Finland", True),
    ("Finland", "The official language of Finland is Swedish", None),  # one of two
    ("Finland", "The official languages of Finland are Finnish and Swedish", True),
    ("Jordan", "The official language of Jordan is French", False),
    ("Jordan", "Jordan is a predominantly Muslim country", True),
    ("Jordan", "The people of Jordan are predominantly Christian", False),
    ("Kenya", "Kenya has a largely Christian population", True),
    ("Mauritius", "Mauritius is a predominantly Hindu nation", None),  # 48.5 %
    ("Nepal", "Nepal is a predominantly Hindu country", True),
    ("Nauru", "The capital of Nauru is Suva", None),
    ("Chad", "Chad is surrounded by Libya and Niger", None),  # two of six
    ("Uganda", "Uganda is located in East Africa", True),  # East-Central Africa
    ("Botswana", "Botswana is a South African country", None),
    ("Kenya", "Kenya is located in the Indian Ocean", None),  # on it
    ("Andorra", "Andorra is located in Southern Europe", None),  # Southwestern Europe
    ("Andorra", "Andorra is located in Northern Europe", False),
    ("Jordan", "Jordan is known for its vibrant culture", None),
    ("Jordan", "Jordan", None),
    ("Jordan", "", None),
]


@pytest.fixture(scope="module")
def countries():
    return second_verifier.load(ROOT / "data/world/countries.jsonl")


@pytest.mark.parametrize("topic, claim, truth", CLAIMS, ids=[c[1] or "empty" for c in CLAIMS])
def test_claims(countries, topic, claim, truth):
    assert countries[second_verifier.fold(topic)].judge(claim)[0] is truth


def test_typed_values(countries):
    """Read off six entries by eye."""
    assert countries["bolivia"].land == {"argentina", "brazil", "chile", "paraguay", "peru"}
    assert countries["russia"].land >= {"north korea", "lithuania", "poland"}  # in brackets
    assert len(countries["russia"].land) == 14
    assert countries["south africa"].capitals == {"pretoria", "cape town", "bloemfontein"}
    assert countries["latvia"].people == 1888439 and countries["latvia"].area == 64589
    assert countries["lesotho"].official == {"sesotho", "english"}
    assert countries["uganda"].faiths["roman catholic"] == 39.3


def test_borders_are_mutual(countries):
    """A neighbour has the country in its own list, but for the Factbook's gaps."""
    gaps = {(a, b) for a, c in countries.items() for b in c.land
            if b in countries and a not in countries[b].land}
    assert gaps == {("western sahara", "mauritania"), ("western sahara", "morocco"),
                    ("western sahara", "algeria"), ("hong kong", "china"), ("macau", "china")}


@pytest.fixture
def corpus(tmp_path):
    """Two countries that border each other and no other."""
    return write_rows(tmp_path / "corpus.jsonl", [
        {"title": a, "field": "Land boundaries", "text": f"total: 9 km; border countries: {b} 9 km"}
        for a, b in (("Chad", "Libya"), ("Libya", "Chad"), ("Egypt", "Nowhere"))])


def fact(text, label="S", **more):
    return {"text": text, "label": label, "kind": "other", **more}


def make_row(topic, *sentences, name="a"):
    parts = [{"text": f"s{n}", "start": n, "end": n + 1, "facts": facts}
             for n, facts in enumerate(sentences)]
    return {"id": f"{name}/0", "prompt_id": name, "topic": topic, "response": "r", "finish": "stop",
            "abstained": False, "sentences": parts}


def test_writes_both_files(tmp_path, corpus):
    """Only what it judges and the first label settles; all else of a row as it was."""
    kept, wrong = fact("Chad borders Libya", human="S"), fact("Chad borders Egypt", "S")
    null = fact("Chad borders Libya", None)
    rows = [make_row("Chad", [kept, fact("Chad is lovely"), null], [wrong]),
            make_row("Nowhere", [fact("Nowhere borders Chad")], name="b"),
            make_row("Chad", name="c")]
    path = write_rows(tmp_path / "v.jsonl", rows)
    done = call("tests/second_verifier.py", "--in", path, "--out-dir", tmp_path / "out",
                "--corpus", corpus)
    assert done.returncode == 0 and "judged 2 of 5" in done.stderr
    assert "first S, second NS: 1" in done.stderr and "first S, second S: 1" in done.stderr
    expected = [make_row("Chad", [kept], [wrong]), make_row("Nowhere", [], name="b"), rows[2]]
    assert read_rows(tmp_path / "out/v.first.jsonl") == expected
    expected[0]["sentences"][1]["facts"] = [{**wrong, "label": "NS"}]
    assert read_rows(tmp_path / "out/v.second.jsonl") == expected
    score = call("06_eval.py", "score", "--in", tmp_path / "out/v.second.jsonl", "--json")
    assert score.returncode == 0 and json.loads(score.stdout)["n_responses"] == 3


def test_refuses_two_files_of_one_stem(tmp_path):
    done = call("tests/second_verifier.py", "--in", "a/v.jsonl", "b/v.jsonl", "--out-dir", tmp_path)
    assert done.returncode == 2 and "one stem" in done.stderr and not list(tmp_path.iterdir())


def test_facts_without_a_first_label(tmp_path, corpus):
    """Human labelled files go in as they are."""
    row = make_row("Chad", [{"text": "Chad borders Libya", "human": "S"}])
    path = write_rows(tmp_path / "v.jsonl", [row])
    done = call("tests/second_verifier.py", "--in", path, "--out-dir", tmp_path,
                "--corpus", corpus)
    assert done.returncode == 0
    assert read_rows(tmp_path / "v.first.jsonl") == [row]
    row["sentences"][0]["facts"][0]["label"] = "S"
    assert read_rows(tmp_path / "v.second.jsonl") == [row]


def test_against_human_labels(countries):
    """Precision and specificity at least .95, over enough claims to mean something."""
    table = Counter()
    for row in read_rows(ROOT / "tests/labelled_claims.jsonl"):
        country = countries[second_verifier.canon(second_verifier.fold(row["topic"]))]
        for human in (f for s in row["sentences"] for f in s["facts"]):
            table[human["human"], country.judge(human["text"])[0]] += 1
    right, false_s, false_ns = table["S", True], table["NS", True], table["NS", False]
    assert right >= 140 and false_ns >= 60
    assert right / (right + false_s) >= 0.95 and false_ns / (false_ns + false_s) >= 0.95
    assert table["S", False] <= 0.05 * right and not table["IR", True] + table["IR", False]


def test_reads_nothing_of_the_first_verifier():
    source = (ROOT / "tests/second_verifier.py").read_text("utf-8")
    assert not any(word in source for word in ("import rules", "from rules", "lexicon", "03_ver"))
