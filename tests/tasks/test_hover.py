"""hover: both published forms, hard claims and the others, one label and no hedging, feedback that names the hop."""

import json
import sqlite3
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.errors import UserError
from fst_fast.records import Problem, Verdict
from fst_fast.tasks import make_task
from fst_fast.tasks.hover import read_label
from fst_fast.tasks.published import PublishedOptions

FOLDER = Path(__file__).parents[1] / "data" / "hover"
TRAIN = json.loads((FOLDER / "hover_train_release_v1.1.json").read_text())
DEV = json.loads((FOLDER / "hover_dev_release_v1.1.json").read_text())
TASK = make_task(f"hover:{FOLDER}", seed=0)
PROBLEM = next(p for p in TASK.train if "on the Rhône, played" in p.data["claim"])
TITLES = ["The Long Night (film)", "Ida Moreau", "Lyon", "Cello"]


def uids(problems: Any) -> set[str]:
    return {p.id.rpartition("/")[2] for p in problems}


def test_hard_claims_are_those_of_three_and_four_hops_and_dev_is_held_out() -> None:
    assert uids(TASK.train) == {r["uid"] for r in TRAIN if r["num_hops"] > 2}
    assert uids(TASK.validation) == {r["uid"] for r in DEV if r["num_hops"] > 2}


def test_out_of_distribution_are_the_claims_of_other_hops() -> None:
    ood = make_task(f"hover-ood:{FOLDER}", seed=0)
    assert uids(ood.validation) == {r["uid"] for r in DEV if r["num_hops"] == 2}
    only_four = PublishedOptions(hops=(4,))
    assert uids(make_task(f"hover:{FOLDER}", seed=0, data=only_four).validation) == {
        r["uid"] for r in DEV if r["num_hops"] == 4
    }


def test_one_file_is_split_and_its_claims_stay_apart() -> None:
    task = make_task(f"hover:{FOLDER / 'hover_train_release_v1.1.json'}", seed=0)
    assert (len(task.train), len(task.validation)) == (7, 1)
    assert not uids(task.train) & uids(task.validation)


def test_the_hubs_form_of_a_row_gives_the_same_problem(tmp_path: Path) -> None:
    rows = [
        {"id": i, "uid": r["uid"], "claim": r["claim"], "label": int(r["label"] == "SUPPORTED"),
         "supporting_facts": [{"key": t, "value": s} for t, s in r["supporting_facts"]],
         "num_hops": r["num_hops"], "hpqa_id": r["hpqa_id"]}
        for i, r in enumerate(TRAIN)
    ]  # fmt: skip
    (tmp_path / "hub.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hub, release = (
        make_task(f"hover:{path}", seed=0)
        for path in (tmp_path / "hub.jsonl", FOLDER / "hover_train_release_v1.1.json")
    )
    both = [sorted(str(sorted(p.data.items())) for p in [*t.train, *t.validation]) for t in (hub, release)]
    assert both[0] == both[1]


def test_a_claim_comes_alone_with_its_rows_text_or_with_the_articles_that_decide_it(tmp_path: Path) -> None:
    assert TASK.messages("check.", PROBLEM)[1]["content"] == (
        f"Claim: {PROBLEM.data['claim']}\nIs the claim SUPPORTED or NOT_SUPPORTED?"
    )
    wiki = sqlite3.connect(tmp_path / "wiki.db")
    wiki.execute("CREATE TABLE documents (id PRIMARY KEY, text)")
    titles = {title for r in TRAIN + DEV for title, _ in r["supporting_facts"]}
    wiki.executemany(
        "INSERT INTO documents VALUES (?, ?)", [(unicodedata.normalize("NFD", t), f"Of {t}.") for t in titles]
    )
    wiki.commit()
    task = make_task(f"hover:{FOLDER}", seed=0, data=PublishedOptions(wiki=str(tmp_path / "wiki.db")))
    told = next(p for p in task.train if p.id == PROBLEM.id).data["problem"]
    assert [f"{t}: Of {t}." in told for t in TITLES] == [True] * 4
    assert "Lübeck" not in told
    rows = [{**TRAIN[i], "context": context} for i, context in enumerate(["A text.", [["Lyon", "Text of Lyon."]]])]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    own = make_task(f"hover:{tmp_path / 'rows.json'}", seed=0)
    starts = {p.data["problem"].partition("\n")[0] for p in [*own.train, *own.validation]}
    assert starts == {"A text.", "Lyon: Text of Lyon."}


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("answer: SUPPORTED", "SUPPORTED"),
        ("Answer: not supported.", "NOT_SUPPORTED"),
        ("**NOT_SUPPORTED**", "NOT_SUPPORTED"),
        ("so\nThe claim is supported by the evidence.", "SUPPORTED"),
        ("answer: \\boxed{\\text{NOT\\_SUPPORTED}}", "NOT_SUPPORTED"),
        ("It isn’t supported.", "NOT_SUPPORTED"),
        ("unsupported", "NOT_SUPPORTED"),
        ("`Supported`", "SUPPORTED"),
        ("answer: SUPPORTED\nwait.\nanswer: NOT_SUPPORTED", "NOT_SUPPORTED"),
        ("ＳＵＰＰＯＲＴＥＤ", "SUPPORTED"),
        ("answer: SUPPORTED or NOT_SUPPORTED", None),
        ("not not supported", None),
        ("SUPPORTED?", None),
        ("", None),
        ("partly supported", None),
        ("neither supported nor unsupported", None),
        ("supported NOT", None),
        ("REFUTED", None),
        ("SUPPORTED NOT_SUPPORTED", None),
        ("answer: true", None),
        ("answer:\nSUPPORTED" + " is" * 200, None),
        ("SUPPОRTED", None),
    ],
)
def test_the_final_answer_is_one_label_however_it_is_written(response: str, label: str | None) -> None:
    assert read_label(response) == label


def test_a_right_label_is_all_it_takes() -> None:
    assert TASK.verify(PROBLEM, "answer: SUPPORTED") == Verdict(1.0, "correct.", {"label": 1, "read": 1, "hops": 0})


@pytest.mark.parametrize(
    ("response", "said", "hops"),
    [
        (
            "the long night is by IDA MOREAU of Lyon.\nanswer: not supported",
            "the claim is SUPPORTED, not NOT_SUPPORTED. it rests on 4 articles: "
            "The Long Night (film); Ida Moreau; Lyon; Cello. the response misses the hop to Cello. expected: SUPPORTED",
            0.75,
        ),
        (
            "The Long Night, Ida Moreau, Lyon, cello.\nanswer: NOT_SUPPORTED",
            "mentions them all, and combines them wrongly",
            1,
        ),
        ("no idea", "the final answer must be SUPPORTED or NOT_SUPPORTED, alone after 'answer:'", 0),
    ],
)
def test_feedback_names_the_hop_that_was_missed(response: str, said: str, hops: float) -> None:
    verdict = TASK.verify(PROBLEM, response)
    assert verdict.reward == 0
    assert said in verdict.feedback
    assert verdict.parts["hops"] == hops


@given(st.one_of(st.text(), st.text("SUPORTEDNsuported_ \nanswer:")))
def test_any_text_gets_a_verdict(response: str) -> None:
    assert TASK.verify(PROBLEM, response).reward in (0.0, 1.0)


@pytest.mark.parametrize("response", ["answer:" * 10**5, "(" * 10**6, "\x00\ud800", "not " * 10**5, "\n" * 10**6])
def test_hostile_text_is_wrong(response: str) -> None:
    verdict = TASK.verify(PROBLEM, response)
    assert verdict.reward == 0
    assert len(verdict.feedback) < 500


ROW = TRAIN[0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{k: v for k, v in ROW.items() if k != "claim"}], {}, "row 1: there is no field 'claim'"),
        ([{**ROW, "label": -1}], {}, "row 1: field 'label' is -1; it must be SUPPORTED or NOT_SUPPORTED"),
        ([{**ROW, "supporting_facts": [3]}], {}, "field 'supporting_facts' holds 3, not"),
        ([{**ROW, "num_hops": "3"}], {}, "field 'num_hops' is '3'; it must be of type int"),
        ([ROW, ROW], {}, "two claims have the same uid"),
        ([{**ROW, "num_hops": 2}], {}, r"no claim has 3 or 4 hops \(data\.hops\)"),
        ([ROW], {"wiki": "absent.db"}, r"data\.wiki: 'absent\.db' is not a file"),
        ([ROW], {"wiki": __file__}, r"data\.wiki: .* is not HoVer's wiki_wo_links\.db \("),
    ],
)
def test_what_is_not_in_the_format_is_refused(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message) as e:
        make_task(f"hover:{tmp_path / 'rows.json'}", seed=0, data=PublishedOptions(**options))
    assert "\n" not in str(e.value)


def test_a_folder_without_the_release_and_a_wiki_without_the_article_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no hover_dev_release_v1\.1\.json in the folder"):
        make_task(f"hover:{tmp_path}", seed=0)
    sqlite3.connect(tmp_path / "w.db").execute("CREATE TABLE documents (id PRIMARY KEY, text)").connection.commit()
    with pytest.raises(UserError, match="has no article '"):
        make_task(f"hover:{FOLDER}", seed=0, data=PublishedOptions(wiki=str(tmp_path / "w.db")))


def test_problems_are_plain_and_distinct() -> None:
    everything: list[Problem] = [*TASK.train, *TASK.validation]
    assert len({p.id for p in everything}) == len(everything)
    assert "SUPPORTED" in TASK.seed_prompt
