"""Cited numbers: each with its paper and setting, for experiments that exist."""

import pathlib
import tomllib

import pytest

from marginface.report.study import published

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENTS = {p.stem for p in (ROOT / "experiments").glob("*.py")} - {"__init__", "common"}

ONE = """
[papers.a2019b]
title = "A"
authors = "B"
year = 2019
venue = "CVPR"
[papers.c2020d]
title = "C"
authors = "D"
year = 2020
venue = "CVPR"
[[tables]]
paper = "a2019b"
table = "Table 1"
data = "CASIA-WebFace"
backbone = "ResNet-50"
rows = [
    { method = "ArcFace", experiment = "arcface", protocol = "10 folds", lfw = 99.50, ytf = 95 },
    { method = "Other", of = "c2020d", protocol = "10 folds", data = "MS1MV2", lfw = 99.0 },
]
"""


# Numbers that were only seen plotted, or in no document: (key of the bibliography, metric, value);
# the key is "" where no paper prints that value.
FORBIDDEN = [
    # SphereFace by m, and its three patches together
    ("liu2017sphereface", "lfw", 97.88),
    ("", "lfw", 97.90),
    ("", "lfw", 98.40),
    ("", "lfw", 99.25),
    ("", "ytf", 93.2),
    ("", "ytf", 93.8),
    ("liu2017sphereface", "ytf", 94.4),
    ("", "megaface_rank1", 75.766),
    ("", "megaface_tar", 89.142),
    # L-Softmax by its own paper
    ("", "lfw", 98.71),
    # RegularFace on CASIA-WebFace
    ("zhao2019regularface", "lfw", 99.33),
    ("zhao2019regularface", "ytf", 94.4),
    # GroupFace, and the ArcFace that it is compared with
    ("", "calfw", 96.20),
    ("", "ijbc_1e5", 94.53),
    ("", "ijbb_1e4", 94.25),
    ("", "ijbc_1e5", 93.94),
    ("", "ijbc_1e4", 95.94),
    # DeepFace: one network with chi-squared, and a Siamese one
    ("", "lfw", 97.00),
    ("", "lfw", 96.17),
]


def forbidden(row):
    """The numbers of a row that must not be cited."""
    keys = {"", row.key, row.source.removeprefix("quoted by ")}
    return [
        (metric, value)
        for key, metric, value in FORBIDDEN
        if key in keys and row.metrics.get(metric) == value
    ]


@pytest.fixture(scope="module")
def cited():
    return published.load()


def test_every_row_says_where_it_comes_from(cited):
    assert len(cited) > 100
    for row in cited:
        texts = (row.key, row.title, row.authors, row.venue, row.table, row.method)
        assert all(texts), row
        assert all((row.data, row.backbone, row.protocol)), row
        assert 2006 <= row.year <= 2026
        assert row.key.isidentifier()
        assert str(row.year) in row.key
        assert row.metrics


def test_experiments_exist_and_metrics_are_percentages(cited):
    for row in cited:
        assert row.experiment in EXPERIMENTS | {""}, row
        assert row.metrics.keys() <= published.METRICS.keys()
        assert all(1 < value <= 100 for value in row.metrics.values())
        assert all(value > 80 for key, value in row.metrics.items() if key in ("lfw", "ytf")), row


def test_nothing_unverified_is_cited():
    text = published.PATH.read_text(encoding="utf-8").lower()
    assert "unverified" not in text
    assert "(figure)" not in text
    assert "not recorded" not in text


def test_no_forbidden_number_is_cited(cited):
    assert not [(row.key, row.table, row.method, forbidden(row)) for row in cited if forbidden(row)]


@pytest.mark.parametrize(("key", "metric", "value"), FORBIDDEN)
def test_a_forbidden_number_would_be_found(cited, key, metric, value):
    assert metric in published.METRICS
    row = next(row for row in cited if key in ("", row.key))
    assert forbidden(row._replace(metrics=row.metrics | {metric: value}))


def test_numbers_whose_base_loss_is_not_restated_belong_to_no_experiment(cited):
    found = [row for row in cited if row.key == "zhao2019regularface"]
    assert {row.metrics.get("lfw") or row.metrics["megaface_rank1"] for row in found} == {
        *(99.61, 70.23, 75.61)
    }
    assert {row.experiment for row in found} == {""}


def test_every_paper_of_the_bibliography_is_cited(cited):
    papers = tomllib.loads(published.PATH.read_text(encoding="utf-8"))["papers"]
    assert published.bibliography(cited).keys() == papers.keys()


def test_no_row_stands_there_twice(cited):
    # note and metrics apart; the five runs of one README are told apart by their method
    found = [(r.key, r.source, r.table, r.data, r.backbone, r.protocol, r.method) for r in cited]
    assert len(set(found)) == len(found)


def test_some_numbers(cited):
    def only(key, table, method):
        (row,) = [r for r in cited if (r.key, r.table, r.method) == (key, table, method)]
        return row

    arcface = only("deng2019arcface", "Table 2", "ArcFace (0.5)")
    assert arcface.metrics == {"lfw": 99.53, "cfp_fp": 95.56, "agedb": 95.15}
    assert (arcface.experiment, arcface.source) == ("arcface", "")
    cosface = only("wang2018cosface", "Table 2", "LMCL")
    assert (cosface.metrics["lfw"], cosface.metrics["ytf"]) == (99.33, 96.1)
    sphereface = only("liu2017sphereface", "comparison on LFW and YTF", "A-Softmax, m = 4")
    assert sphereface.metrics == {"lfw": 99.42, "ytf": 95.0}
    assert only("liu2017sphereface", "Table 2", "A-Softmax").source == "quoted by wang2018cosface"
    groupface = [r for r in cited if r.experiment == "groupface"]
    assert {r.source for r in groupface} == {"quoted by deng2022arcface"}


def test_reading(tmp_path):
    path = tmp_path / "published.toml"
    path.write_text(ONE)
    first, second = published.load(path)
    assert (first.key, first.source, first.data) == ("a2019b", "", "CASIA-WebFace")
    assert first.metrics == {"lfw": 99.5, "ytf": 95.0}
    assert first.printed == {"lfw": "99.50", "ytf": "95"}
    assert (second.key, second.source) == ("c2020d", "quoted by a2019b")
    assert (second.data, second.title, second.experiment) == ("MS1MV2", "C", "")
    assert published.bibliography([second], path) == {
        "a2019b": "B: A. CVPR, 2019.",
        "c2020d": "D: C. CVPR, 2020.",
    }
    assert published.of_experiments([first, second], ["arcface"]) == [first]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[papers.a2019b]", "[papers", "is not TOML"),
        ('year = 2019\nvenue = "CVPR"', 'venue = "CVPR"', "papers.a2019b lacks year"),
        ("year = 2019", 'year = "2019"', "papers.a2019b: year='2019' is not a number"),
        ('title = "A"', 'title = ""', "papers.a2019b: title='' is not a text"),
        ('title = "A"', 'titel = "A"\ntitle = "A"', "unknown key 'titel'; known: title"),
        ('paper = "a2019b"', 'paper = "a2019c"', r"no \[papers.a2019c\]; known: a2019b"),
        ('of = "c2020d"', 'of = "c2021d"', r"no \[papers.c2021d\]"),
        ("lfw = 99.50", "lfw = 0.995", "lfw=0.995 is no percentage"),
        ("lfw = 99.50", "lfw = 995", "lfw=995 is no percentage"),
        ("lfw = 99.50", "lfw = true", "lfw=True is not a number"),
        ("lfw = 99.50", "lfv = 99.50", "unknown key 'lfv'; known: experiment"),
        ("lfw = 99.0 }", "}", "Other has no metric"),
        ('data = "CASIA-WebFace"\n', "", "say data, backbone and protocol"),
        ("rows = [", "rows = [3, ", "a row is int, not a table of keys"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    assert old in ONE
    path = tmp_path / "published.toml"
    path.write_text(ONE.replace(old, new).replace("99.0, }", "99.0 }").replace(", }", " }"))
    with pytest.raises(ValueError, match=message) as caught:
        published.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
