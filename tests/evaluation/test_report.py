import copy
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from cotrain.evaluation.charts import draw_charts, read_series, teacher_start
from cotrain.evaluation.compare import Lift
from cotrain.evaluation.report import json_ready, result_table, signed, verdict, write_report

VOID = {"meta", "br", "col", "img", "link", "input", "hr"}
HOSTILE = "<script>alert('x')</script> & \"[Z]\" $\\frac$ </pre></details>"


def scores(scale):
    names = [f"{family}@{k}" for family in ("recall", "ndcg") for k in (1, 5, 10, 20)] + ["mrr"]
    return {name: scale * (i + 1) / 100 for i, name in enumerate(names)}


def lift(absolute, low, high, p):
    return {"absolute": absolute, "relative": absolute / 0.05, "ci95": [low, high], "p_value": p}


@pytest.fixture
def report():
    shown = ["Heat", "Babe", "Se7en", "Clerks"]
    example = {
        "user": "u<1>",
        "history": ["Casino", HOSTILE],
        "shown": shown,
        "identifiers": ["A", "B", "C", "D"],
        "teacher_ranking": ["Clerks", "Heat", "Babe", "Se7en"],
        "teacher_ranks": [1.0, 2.0, 3.0, 4.0],
        "teacher_probs": [0.5, 0.25, 0.15, 0.1],
        "student_ranking": shown[::-1],
        "target": "Babe",
        "prompt": f"History:\n{HOSTILE}\nAnswer: [",
        "reasoning": "",
        "valid": True,
    }
    model = {"validation": scores(1.1), "test": scores(1), "best_epoch": 7, "parameters": 400_000}
    model["recommended"] = {
        "coverage@10": 0.184, "popularity@10": 0.935, "head_share@10": 0.8, "gini@10": 0.9378
    }  # fmt: skip
    means = {"recall@10": 0.1, "ndcg@10": 0.05}
    rows = [("Popularity of the target", "second quarter", "9 items, 2–3 interactions each", 40)]
    rows += [("Length of the history", "1–4 items", "", 1234)]
    slices = [
        {"view": view, "label": label, "detail": detail, "users": users, "share": 0.25}
        | {"student": means, "control": means}
        | {"lift": {name: lift(0.001, -0.002, 0.004, 0.5) for name in means}}
        for view, label, detail, users in rows
    ]
    return {
        "name": "ml-100k",
        "seed": 0,
        "seconds": 512.3,
        "shipped": "control",
        "dataset": {
            "name": "ml-100k",
            "users": 943,
            "items": 1682,
            "interactions": 100_000,
            "notes": ["1 item has no title."],
            "split": "time",
            "evaluated_users": {"validation": 81, "test": 69},
            "targets": {"popularity": 0.772, "head_share": 0.353},
        },
        "slices": slices,
        "student": model,
        "control": copy.deepcopy(model),
        "lift": {
            name: lift(0.0004, -0.0021, 0.0030, 0.74) for name in ("ndcg@10", "recall@10", "mrr")
        },
        "lift_validation": None,
        "teacher": {
            "model": "SmolLM2-135M-Instruct",
            "quantization": "nf4",
            "adapter": None,
            "mode": "direct",
            "decision_position": "predict",
            "identifiers": "letters",
            "template": "default",
            "num_candidates": 4,
            "window": None,
            "stride": None,
            "shuffles": 1,
            "calibration": "batch",
            "identifier_bias": [0.5, -0.25, 0.0, -0.25],
            "parameters": 134_515_008,
            "rows_asked": 200,
            "rows_valid": 190,
            "rows_full": 172,
            "partial": {"truncated": 15, "repeated": 3},
            "failures": {"non_finite": 7, "prompt too long": 3},
            "backoffs": [],
            "rows_per_s": 11.4,
            "prompt_tokens_per_s": 4321.0,
            "seconds": 17.5,
            "prompt_tokens": 75_000,
            "generated_tokens": 0,
            "entropy": 1.2,
            "entropy_uniform": math.log(4),
            "confidence": 0.13,
            "target_in_candidates": 0.17,
            "agreement_of_shuffles": 0.0,
            "agreement_with_student": -0.05,
            "mean_rank_by_shown_position": [2.3, 2.4, 2.6, 2.7],
            "choice_share_by_shown_position": [0.3, 0.3, 0.2, 0.2],
            "before_calibration": {
                "rows": 64,
                "mean_rank_by_shown_position": [1.5, 2.4, 2.9, 3.2],
                "choice_share_by_shown_position": [0.6, 0.2, 0.1, 0.1],
            },
        },
        "effective_rank": {
            "student_state": 31.2,
            "decision_state": 18.9,
            "student_state_start": 38.0,
            "collapsed": False,
        },
        "warnings": ["The teacher prefers early positions."],
        "examples": [example, {**example, "valid": False, "target": "Elsewhere"}],
        "config": {"student": {"hidden_size": 64}, "seed": 0},
        "environment": {"cotrain": "0.1.0", "device": "cpu"},
    }


@pytest.fixture
def curves():
    rows = []
    for step in range(1, 101):
        row = {"kind": "train", "step": step, "epoch": step / 10, "loss_ce": 7 - step / 50}
        row["loss"] = row["loss_ce"]
        if step > 40:
            row |= {"loss_rank": 2.5, "loss_emb": 0.4, "control_loss_ce": 5.0}
            row |= {"teacher_entropy": 1.2, "teacher_rows_per_s": 11.0}
        if step % 10 == 0:
            row |= {"student_state_effective_rank": 30.0, "decision_state_effective_rank": 15.0}
            for model in ("student", "control")[: 1 + (step > 40)]:
                rows.append(
                    {"kind": "validation", "step": step, "epoch": step / 10, "model": model}
                    | {"ndcg@10": step / 2000, "recall@10": step / 1000}
                )
        rows.append(row)
    return rows


class Page(HTMLParser):
    """Checks nesting and gathers what a test asks about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for key, value in attrs if key in ("src", "href", "xlink:href", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.text += " "

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def render(report, curves, folder):
    return write_report(report, curves, folder)[1].read_text(encoding="utf-8")


def test_json_keeps_everything_and_nulls_what_is_not_finite(report, curves, tmp_path):
    report["mine"] = {"grid": np.arange(3), "deep": [np.float32(0.5), math.nan, -math.inf]}
    report["folder"] = tmp_path
    report["teacher"]["agreement_with_student"] = math.nan
    report["lift"]["mrr"] = Lift(0.1, None, (-0.1, 0.3), 0.4)
    path, _ = write_report(report, curves, tmp_path / "new" / "run")
    loaded = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert loaded["mine"] == {"grid": [0, 1, 2], "deep": [0.5, None, None]}
    assert loaded["folder"] == str(tmp_path)
    assert loaded["teacher"]["agreement_with_student"] is None
    assert loaded["lift"]["mrr"] == Lift(0.1, None, (-0.1, 0.3), 0.4).as_dict()
    assert loaded == json_ready(report)
    assert set(report) == set(loaded)
    untouched = ("dataset", "student", "control", "config", "environment", "examples", "warnings")
    for key in untouched:
        assert loaded[key] == report[key], key


def test_only_the_two_files_are_left(report, curves, tmp_path):
    written = write_report(report, curves, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert [path.name for path in written] == ["report.json", "report.html"]


def test_the_numbers_survive_a_page_that_fails(report, tmp_path):
    (tmp_path / "report.html").write_text("earlier page")
    unreadable: Any = ["not a row"]
    with pytest.raises(AttributeError):
        write_report(report, unreadable, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    assert (tmp_path / "report.html").read_text() == "earlier page"


def test_page_is_well_formed_and_asks_the_network_for_nothing(report, curves, tmp_path):
    html = render(report, curves, tmp_path)
    page = Page(html)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "//" not in re.sub(r"<!--.*?-->", "", html, flags=re.DOTALL)
    assert "@import" not in html
    assert all(target.startswith("url(#") for target in re.findall(r"url\([^)]*", html))


def test_drawings_do_not_share_ids(report, curves, tmp_path):
    html = render(report, curves, tmp_path)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', html)
    assert used
    assert set(used) <= set(ids)


def test_what_users_wrote_is_escaped(report, curves, tmp_path):
    for place in ("name", "shipped"):
        report[place] = HOSTILE
    report["warnings"] = report["dataset"]["notes"] = [HOSTILE]
    report["teacher"]["failures"] = {HOSTILE: 1}
    report["teacher"]["template"] = HOSTILE
    report["config"] = {HOSTILE: HOSTILE}
    report["examples"][0] |= {"shown": [HOSTILE] * 4, "reasoning": HOSTILE}
    curves.append({"kind": "train", "step": 101, "epoch": 10.1, f"loss_{HOSTILE}": 1.0})
    html = render(report, curves, tmp_path)
    assert "<script" not in html
    page = Page(html)
    assert page.text.count(HOSTILE) >= 14


def test_page_shows_the_run(report, curves, tmp_path):
    text = " ".join(Page(render(report, curves, tmp_path)).text.split())
    for expected in (
        "The student is not distinguishable from its control.",
        "The teacher prefers early positions.",
        "−0.0021 to +0.0030",
        "100,000",
        "1 item has no title.",
        "Asked 200 100.0 %",
        "Valid 190 95.0 % only these teach the student",
        "Whole order 172 86.0 %",
        "Partial: truncated 15 7.5 % stopped or was cut before all were named; what was named "
        "counts",
        "Partial: repeated 3 1.5 %",
        "Failed: non finite 7 3.5 % numbers that are not finite",
        "Failed: prompt too long 3 1.5 %",
        "Identifiers letters",
        "Template default",
        "Calibration batch",
        "Identifier bias removed 0.8 nats between its dearest and its least loved identifier, on "
        "64 rows",
        "1.20 nats",
        "The teacher put the true next item at place 3 of 4.",
        "The true next item, Elsewhere, was not among the candidates.",
        "The teacher's answer was not usable",
        "student.hidden_size",
        "Test users69",
        "Split by time: training ends at one moment for all users",
        "Popularity percentile of the items shown, by training interactions; 50 % is what a random "
        "draw has 93.5 % 93.5 % 77.2 %",
        "Gini of exposure 0: every item equally often, 1: one item for all 0.9378 0.9378 –",
        "second quarter 9 items, 2–3 interactions each 40 25.0 % 0.1000 0.1000 +0.0010 "
        "−0.0020 to +0.0040",
        "1–4 items 1,234 25.0 %",
    ):
        assert expected in text, expected
    assert text.count("Babe next") == 3  # as shown, teacher's and student's place, first example


def test_page_shows_what_only_some_teachers_do(report, curves, tmp_path):
    absent = " ".join(Page(render(report, curves, tmp_path)).text.split())
    report["teacher"] |= {
        "mode": "cot", "window": 2, "shuffles": 3, "agreement_of_shuffles": 0.412,
        "generated_tokens": 12_800, "adapter": "some/lora",
        "backoffs": [
            {"process": 0, "from_tokens": 8192, "to_tokens": 4096, "rows": 9, "longest": 430},
            {"process": 1, "from_tokens": 4096, "to_tokens": 2048, "rows": 9, "longest": 410},
        ],
    }  # fmt: skip
    report["examples"][0]["reasoning"] = "They like [slow] films < 2 h."
    present = " ".join(Page(render(report, curves, tmp_path)).text.split())
    for expected in (
        "Adapter some/lora",
        "Window 2 candidates in one prompt, moving on by half a window",
        "Orders shown 3 ranks are their mean; they agree by 0.412",
        "Tokens written 12,800 64.0 a row",
        "Memory ran out 2 × prompt tokens in one pass went from 8,192 down to 2,048",
        "The teacher's reasoning",
        "They like [slow] films < 2 h.",
    ):
        assert expected in present, expected
    for label in ("Adapter", "Window", "Orders shown", "Tokens written", "Memory", "reasoning"):
        assert label not in absent


def test_ties_are_shown_as_ties(report, curves, tmp_path):
    report["examples"] = report["examples"][:1]
    report["examples"][0]["teacher_ranks"] = [1.0, 3.0, 3.0, 3.0]
    html = render(report, curves, tmp_path)
    assert html.count('<span class="hint">tied</span>') == 3
    text = " ".join(Page(html).text.split())
    assert "true next item at place 3 of 4, the mean of those that it tied." in text


def test_bias_is_drawn_before_and_after_calibration(report, curves):
    def bias_charts():
        return [chart for chart in draw_charts(report, curves) if "Position bias" in chart.title]

    for chart in bias_charts():
        assert "before calibration" in chart.svg
        assert "no bias" in chart.svg
        assert "64 rows" in chart.caption
        assert "var(--control" in chart.svg
        assert "var(--teacher" in chart.svg
    report["teacher"]["before_calibration"] = None
    for chart in bias_charts():
        assert "before calibration" not in chart.svg
        assert "no bias" in chart.svg
        assert "var(--control" not in chart.svg


def test_positions_are_named_as_in_the_prompt(report, curves):
    def ticks():
        chart = next(c for c in draw_charts(report, curves) if c.title.endswith("mean rank"))
        return re.findall(r">([A-Z1-9])</text>", chart.svg)

    assert ticks()[:4] == ["A", "B", "C", "D"]
    report["teacher"]["identifiers"] = "numbers"
    assert ticks()[:4] == ["1", "2", "3", "4"]


def test_every_loss_and_every_chart_has_a_caption(report, curves):
    charts = draw_charts(report, curves)
    assert [chart.title for chart in charts] == [
        "Validation NDCG@10",
        "Total training loss",
        "Next-item loss",
        "Ranking loss",
        "Alignment loss",
        "Entropy of the teacher's distribution",
        "Teacher rows per second",
        "Position bias: mean rank",
        "Position bias: first choice",
        "Effective rank of the representations",
    ]
    for chart in charts:
        assert chart.caption.endswith(".")
        assert chart.svg.startswith("<svg ")
        assert chart.svg.endswith("</svg>")
        assert "<metadata" not in chart.svg
        assert len(chart.svg) < 60_000


def test_an_unknown_loss_is_drawn_too(curves):
    curves[-1]["loss_new"] = 1.0
    assert "loss_new" in [chart.title for chart in draw_charts({}, curves)]


def no_teacher(report, curves):
    report.update(teacher=None, effective_rank=None, examples=[], warnings=[])
    return [row for row in curves if row["step"] <= 40]


def no_control(report, curves):
    report.update(control=None, lift=None, shipped="student")
    report["slices"] = [{**row, "control": None, "lift": None} for row in report["slices"]]
    return [row for row in curves if row.get("model") != "control"]


def nothing_recommended(report, curves):
    """As NaN comes out of the JSON."""
    report["student"]["recommended"] = {"coverage@10": 0.0, "gini@10": math.nan}
    report["slices"] = []
    return curves


def neither(report, curves):
    no_control(report, curves)
    return no_teacher(report, curves)


def no_curves(report, curves):
    return []


def one_step(report, curves):
    return curves[:1]


def one_validation(report, curves):
    return [row for row in curves if row["kind"] == "validation"][:1]


def all_nan(report, curves):
    return [{**row, "loss": math.nan, "loss_ce": math.inf, "ndcg@10": None} for row in curves]


def long_run(report, curves):
    return [
        {"kind": "train", "step": i, "epoch": i / 999, "loss": 1.0, "loss_rank": 2.0}
        for i in range(20_000)
    ]


def many_candidates(report, curves):
    report["teacher"]["mean_rank_by_shown_position"] = list(range(60))
    report["teacher"]["choice_share_by_shown_position"] = [0.0] * 59 + [None]
    report["teacher"]["before_calibration"] = None
    report["teacher"] |= {"window": 20, "num_candidates": 60, "identifiers": "numbers"}
    report["examples"][0]["identifiers"] = []
    report["examples"][0]["shown"] = [f"item {i}" for i in range(60)]
    return curves


def teacher_never_asked(report, curves):
    counts = dict.fromkeys(("rows_asked", "rows_valid", "prompt_tokens"), 0)
    nothing = ("rows_per_s", "prompt_tokens_per_s", "entropy", "confidence")
    nothing += ("agreement_of_shuffles", "agreement_with_student", "before_calibration")
    report["teacher"] |= counts | dict.fromkeys(nothing) | {"failures": {}, "seconds": 0.0}
    report["teacher"]["mean_rank_by_shown_position"] = [math.nan] * 4
    report["teacher"]["choice_share_by_shown_position"] = []
    return [row for row in curves if row["step"] <= 40]


def bare(report, curves):
    """Only what a program must give."""
    for key in set(report) - {"student", "shipped"}:
        del report[key]
    return curves


@pytest.mark.parametrize(
    "change",
    [
        no_teacher,
        no_control,
        nothing_recommended,
        neither,
        no_curves,
        one_step,
        one_validation,
        all_nan,
        long_run,
        many_candidates,
        teacher_never_asked,
        bare,
    ],
)
@pytest.mark.filterwarnings("error")
def test_unusual_runs_render(report, curves, tmp_path, change):
    curves = change(report, curves)
    html = render(report, curves, tmp_path)
    page = Page(html)
    assert len(html) < 600_000
    assert "None" not in page.text
    assert "nan" not in page.text.split()
    assert result_table(report)


def test_values_that_cannot_be_drawn_are_counted(curves):
    curves[50]["loss"] = math.nan
    chart = next(c for c in draw_charts({}, curves) if c.title == "Total training loss")
    assert "1 value that was not finite cannot be drawn." in chart.caption


@pytest.mark.parametrize(
    ("low", "high", "tone", "headline"),
    [
        (0.0001, 0.004, "good", "The teacher helped: the student beats its control"),
        (-0.004, -0.0001, "bad", "The teacher hurt: the student is worse than its control"),
        (-0.001, 0.004, "neutral", "The student is not distinguishable from its control"),
        (0.0, 0.004, "neutral", "The student is not distinguishable from its control"),
        (-0.004, 0.0, "neutral", "The student is not distinguishable from its control"),
        (None, None, "neutral", "The lift has no interval, so this run says nothing"),
    ],
)
def test_verdict_claims_only_what_the_interval_carries(report, low, high, tone, headline):
    report["lift"]["ndcg@10"] = lift(0.002, low, high, 0.03)
    words = verdict(report)
    assert words.tone == tone
    assert words.headline.startswith(headline)


def test_verdict_states_the_numbers(report):
    assert verdict(report).detail == (
        "NDCG@10 on test 0.0700 against 0.0700: lift +0.0004 (+0.8 %), 95 % interval −0.0021 to "
        "+0.0030, p = 0.74. Shipped: control (NDCG@10 on validation: student 0.0770, "
        "control 0.0770)."
    )


def test_verdict_gives_the_teacher_no_credit_it_cannot_have(report):
    report["lift"]["ndcg@10"] = lift(0.002, 0.001, 0.003, 0.001)
    report["teacher"]["rows_valid"] = 0
    assert verdict(report).headline.startswith("The teacher gave no usable answer")
    report["teacher"]["rows_asked"] = 0
    assert verdict(report).headline.startswith("The teacher was never asked")
    assert verdict(report).tone == "neutral"
    report.update(control=None, lift=None)
    assert "it has no control" in verdict(report).headline
    report["teacher"] = None
    assert verdict(report).headline == "The student was trained without a teacher"


def test_a_difference_is_bold_only_where_its_interval_excludes_zero(report, curves, tmp_path):
    assert 'class="real"' not in render(report, curves, tmp_path)
    report["lift"]["mrr"] = lift(0.01, 0.004, 0.02, 0.001)
    assert render(report, curves, tmp_path).count('class="real"') == 1
    report["slices"][1]["lift"]["ndcg@10"] = lift(-0.01, -0.02, -0.004, 0.001)
    assert render(report, curves, tmp_path).count('class="real"') == 2


def test_result_table(report):
    assert result_table(report).splitlines() == [
        "           test student  test control  validation student  validation control",
        "recall@10        0.0300        0.0300              0.0330              0.0330",
        "ndcg@10          0.0700        0.0700              0.0770              0.0770",
        "mrr              0.0900        0.0900              0.0990              0.0990",
        "ndcg@10 on test: lift +0.0004 (+0.8 %), 95 % interval -0.0021 to +0.0030, p = 0.74",
        "shipped: control",
    ]
    report.update(control=None, lift=None, shipped="student")
    report["student"]["test"]["mrr"] = math.nan
    table = result_table(report)
    assert "control" not in table
    assert "lift" not in table
    assert table.isascii()


def test_a_step_logged_twice_counts_once():
    rows = [
        {"kind": "train", "step": 2, "epoch": 2.0, "loss": 9.0},
        {"kind": "train", "step": 1, "epoch": 1.0, "loss": 3.0},
        {"kind": "validation", "step": 1, "epoch": 1.0, "loss": 7.0, "model": "student"},
        {"kind": "train", "step": 2, "epoch": 2.0, "loss": 4.0},
        {"kind": "train", "step": 3, "epoch": 3.0},
    ]
    series = read_series(rows, "train", "loss")
    assert (series.x.tolist(), series.y.tolist()) == ([1.0, 2.0], [3.0, 4.0])


def test_teacher_start(curves):
    assert teacher_start(curves) == pytest.approx(4.1)
    assert teacher_start(curves[:20]) is None
    assert teacher_start([]) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0.01, "+0.0100"), (-0.01, "−0.0100"), (-0.00001, "0.0000"), (None, "–")]
)
def test_signed(value, text):
    assert signed(value) == text
