"""What a comparison leaves: a JSON file, a page that stands alone, a table for any console."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError

from cotrain.comparison.charts import _alike_but
from cotrain.comparison.page import console_table, write
from cotrain.comparison.runs import Failure
from cotrain.comparison.summary import summarise
from cotrain.comparison.verdict import verdict
from cotrain.evaluation.formats import duration, number
from cotrain.evaluation.report import json_ready

HOSTILE = "<script>alert('x')</script> & \"[Z]\" $\\frac$ {{ 1 }} </pre></details>"
VOID = {"meta", "br", "col", "img", "link", "input", "hr"}
Result = dict[str, Any]
Make = Callable[..., Result]


class Page(HTMLParser):
    """Checks nesting and gathers what a test asks about."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.fixture
def make(plan, data, run_result) -> Make:
    """Sums up three arms: the second far ahead of the baseline, the third hardly different."""

    def build(
        arms: str = "ce,logit_kd,decision_state", seeds: int = 3, failed: tuple[str, ...] = ()
    ) -> Result:
        results, failures = [], []
        made = plan(arms, seeds)
        for run in made.runs:
            if f"{run.arm}/{run.seed}" in failed:
                failures.append(Failure(run.arm, run.seed, "exit code 1", "some.log", HOSTILE))
                continue
            rng = np.random.default_rng(run.seed)
            alone = rng.integers(1, 40, 60)
            ranks = np.where(rng.random(60) < 0.6, 1, alone) if run.arm == "logit_kd" else alone
            if run.arm == "decision_state":
                ranks = np.roll(alone, 1)
            results.append(run_result(run, ranks, None if run.arm == "ce" else alone))
        return summarise(made, results, failures, data, [])

    return build


@pytest.fixture
def result(make: Make) -> Result:
    return make()


def page(result: Result, folder: Path) -> tuple[str, Page]:
    _, path = write(result, folder)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_the_files_hold_the_result_and_the_verdict(result: Result, tmp_path: Path):
    folder = tmp_path / "comparison"
    folder.mkdir()
    paths = write(result, folder)
    assert [path.name for path in paths] == ["comparison.json", "comparison.html"]
    assert sorted(folder.iterdir()) == sorted(paths)
    loaded = json.loads(paths[0].read_text(encoding="utf-8"))
    assert loaded.pop("verdict") == asdict(verdict(result))
    assert loaded == json.loads(json.dumps(json_ready(result)))


def test_gains_are_drawn_by_the_rows_that_were_asked_for_them(
    plan, data, run_result, tmp_path: Path
):
    made = plan(
        "ce,ranking", 1, vary=("query.fraction=0.05,0.2", "query.policy=entropy", "query.reuse=3")
    )
    rows = dict(zip(made.arms, (0, 30, 15, 60, 30, 10), strict=True))
    results = [
        run_result(run, np.random.default_rng(rows[run.arm]).integers(1, 40, 60),
                   teacher={"rows_asked": rows[run.arm], "seconds": 5.0})
        for run in made.runs
    ]  # fmt: skip
    result = summarise(made, results, [], data, [])
    html, found = page(result, tmp_path)
    assert "by rows that asked the teacher" in found.words
    assert "For each +.001 of NDCG@10" in found.words
    assert html.count("ranking+fraction=0.2") > 2
    taught, fractions = made.arms[1:], ["ranking", "ranking+fraction=0.05", "ranking+fraction=0.2"]
    assert _alike_but(result, taught, "query.fraction")[0] == fractions
    reused = ["ranking", "ranking+reuse=3"]
    assert _alike_but(result, taught, "query.reuse")[0] == reused
    # One number of rows is no curve.
    same = [run_result(one.run, one.ranks, teacher={"rows_asked": 9, "seconds": 1.0})
            for one in results]  # fmt: skip
    _, found = page(summarise(made, same, [], data, []), tmp_path)
    assert "by rows that asked the teacher" not in found.words


def test_the_numbers_survive_a_page_that_fails(result: Result, tmp_path: Path):
    write(result, tmp_path)
    earlier = (tmp_path / "comparison.html").read_text()
    result["seeds"] = [0, 1, 2, 9]
    del result["runs"][0]["shipped"]
    with pytest.raises(UndefinedError):
        write(result, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text())["seeds"] == [0, 1, 2, 9]
    assert (tmp_path / "comparison.html").read_text() == earlier


def test_the_page_asks_the_network_for_nothing(result: Result, tmp_path: Path):
    html, parsed = page(result, tmp_path)
    assert not {"script", "link", "img", "iframe"} & parsed.tags
    assert "//" not in re.sub(r"<!--.*?-->", "", html, flags=re.DOTALL)
    assert "@import" not in html
    assert all(target.startswith("url(#") for target in re.findall(r"url\([^)]*", html))
    assert "default-src 'none'" in html
    # Beside itself it only points at the reports of the runs, by their place in the folder.
    own = [link for link in parsed.links if not link.startswith("#")]
    assert own == [f"{run['folder']}/report.html" for run in result["runs"]]
    assert own[0] == "ce/seed-0/report.html"


def test_drawings_do_not_share_ids(result: Result, tmp_path: Path):
    html, _ = page(result, tmp_path)
    ids = re.findall(r'\bid="([^"]+)"', html)
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', html)
    assert html.count("<svg") == 2
    assert len(ids) == len(set(ids))
    assert used
    assert set(used) <= set(ids)


def test_what_others_wrote_is_escaped(make: Make, tmp_path: Path):
    result = make(failed=("logit_kd/0",))
    assert result["failed"][0]["tail"] == HOSTILE
    result["name"] = HOSTILE
    result["failed"][0] |= {"how": HOSTILE, "log": HOSTILE}
    result["runs"][0]["warnings"] = [HOSTILE]
    result["environment"] = {"device": HOSTILE, HOSTILE: HOSTILE}
    result["settings"] = {"data": {"name": HOSTILE}}
    result["slices"][0] |= {"view": HOSTILE, "label": HOSTILE, "detail": HOSTILE}
    result["arms"]["ce"] |= {"summary": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    html, parsed = page(result, tmp_path)
    assert "<script" not in html
    assert "script" not in parsed.tags
    # title and heading; three of the failure; a warning; device twice, a name and a value of the
    # environment; a setting; three of the slice; three of the arm
    assert parsed.text.count(HOSTILE) == 17


def test_text_that_is_no_unicode_is_written_all_the_same(result: Result, tmp_path: Path):
    result["name"] = "half \ud83d of a sign"
    html, _ = page(result, tmp_path)
    assert "half ? of a sign" in html
    assert json.loads((tmp_path / "comparison.json").read_text())["name"] == "half ? of a sign"


def test_the_page_shows_the_comparison(make: Make, tmp_path: Path):
    result = make(failed=("decision_state/1",))
    result["equal_terms"] |= {"twins": 5, "same": 3, "other_epoch": 1, "differ": 1}
    against = result["arms"]["logit_kd"]["against_baseline"]["ndcg@10"]
    point = result["arms"]["logit_kd"]["per_point"]
    cost = f"{number(round(point['rows']))} rows, {duration(point['seconds'])}"
    html, parsed = page(result, tmp_path)
    found = verdict(result)
    for line in (f"{found.headline}.", *found.findings, *found.limits):
        assert line in parsed.words, line
    for expected in (
        "Comparison of 3 arms · 3 seeds (0, 1, 2) · cpu",
        "decision_state, seed 1: exit code 1, some.log",
        "logit_kd better",
        f"+{against['absolute']:.4f} +{100 * against['relative']:.1f} %",
        f"+{against['ci95'][0]:.4f} to +{against['ci95'][1]:.4f}",
        "decision_state not distinguishable 2 of 3 seeds",
        "and so was the shaded arm, logit_kd; test was read once",
        "Of 5 twins, which learn as ce does, 3 rank every test item exactly as ce of the same "
        "seed; 1 may differ because validation chose another epoch; 1 differ without that reason.",
        "teacher.model none",
        "distill.lambda_emb 0.0",
        f"logit_kd 120 30 s {cost} – 1 min 0 s",
        "Popularity of the target",
        "ce, seed 2",
        "train.epochs 40",
    ):
        assert expected in parsed.words, expected
    chosen = html[html.index('<tr class="chosen">') :]
    assert chosen.startswith('<tr class="chosen"><th scope="row">logit_kd')


def test_only_what_is_told_apart_is_bold(make: Make, tmp_path: Path):
    result = make(seeds=2)
    result["slices"], result["runs"] = [], []
    html, _ = page(result, tmp_path)
    bold = f"+{result['arms']['logit_kd']['against_baseline']['ndcg@10']['absolute']:.4f}"
    assert re.findall(r'class="real">([^<]*)<', html) == [bold]
    # An interval beside zero does not do where the correction for several arms takes it back.
    result["arms"]["logit_kd"]["against_baseline"]["ndcg@10"]["p_holm"] = 0.06
    assert 'class="real"' not in page(result, tmp_path)[0]


def unchanged(make: Make) -> Result:
    return make()


def one_seed(make: Make) -> Result:
    return make(seeds=1)


def one_arm(make: Make) -> Result:
    return make("ce", 2)


def an_arm_without_a_run(make: Make) -> Result:
    return make(seeds=1, failed=("decision_state/0",))


def no_baseline(make: Make) -> Result:
    return make(seeds=1, failed=("ce/0",))


def no_shared_seed(make: Make) -> Result:
    return make("ce,logit_kd", 2, failed=("ce/0", "logit_kd/1"))


def no_run_at_all(make: Make) -> Result:
    return make("ce,logit_kd", 1, failed=("ce/0", "logit_kd/0"))


def all_alike(make: Make) -> Result:
    result = make(seeds=1)
    same = copy.deepcopy(result["arms"]["decision_state"])
    against = same["against_baseline"]["ndcg@10"]
    against |= {"absolute": 0.0, "relative": None, "ci95": [0.0, 0.0], "p_holm": 1.0}
    against["over_seeds"]["by_seed"] = {0: 0.0}
    result["arms"]["logit_kd"] = result["arms"]["decision_state"] = same
    return result


@pytest.mark.parametrize(
    "build",
    [
        unchanged, one_seed, one_arm, an_arm_without_a_run, no_baseline, no_shared_seed,
        no_run_at_all, all_alike,
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_unusual_comparisons_can_be_shown(make: Make, tmp_path: Path, build):
    result = build(make)
    html, parsed = page(result, tmp_path)
    assert len(html) < 600_000
    shown = parsed.words.partition("How it was run")[0]
    assert "None" not in shown
    assert not {"nan", "inf"} & set(shown.split())
    table = console_table(result)
    assert table.isascii()
    assert "None" not in table
    assert f"{verdict(result).headline}." in table


def test_a_run_that_never_ended_is_said_to_have_not(make: Make, tmp_path: Path):
    result = make(seeds=1, failed=("decision_state/0",))
    _, parsed = page(result, tmp_path)
    assert "decision_state 0 of 1 seeds no run ended" in parsed.words
    row = next(line for line in console_table(result).splitlines() if "decision_state" in line)
    assert row.split() == ["decision_state", "0", *"-" * 10]


def test_one_seed_has_no_interval_over_seeds(make: Make, tmp_path: Path):
    _, parsed = page(make(seeds=1), tmp_path)
    assert "1 seed (0)" in parsed.words
    assert "logit_kd better with these seeds" in parsed.words
    assert "±" not in parsed.words.partition("After ±")[0]


def test_the_console_table_by_hand(make: Make):
    result = make("ce,logit_kd", 2)
    numbers = {"mean": 0.0525, "sd": 0.0021, "ci95": None, "by_seed": {0: 0.05, 1: 0.055}}
    for name, arm in result["arms"].items():
        for split in ("test", "validation"):
            arm[split] = dict.fromkeys(("ndcg@10", "recall@10", "mrr"), numbers)
        arm |= {"seconds": 3725.0, "teacher_rows": 12345.4 if name != "ce" else 0.0}
    taught = result["arms"]["logit_kd"]
    taught["against_baseline"]["ndcg@10"] |= {
        "absolute": -0.0012, "ci95": [-0.0031, 0.0007], "p_holm": 0.21, "relative": -0.02
    }  # fmt: skip
    taught["over_own_twin"] = {"ndcg@10": {"mean": 0.0003}}
    lines = console_table(result).splitlines()
    assert [re.split(" {2,}", line) for line in lines[:3]] == [
        ["arm", "seeds", "ndcg@10", "sd", "recall@10", "to ce", "95 % interval", "p (Holm)",
         "to twin", "validation", "teacher rows", "time"],
        ["ce", "2", "0.0525", "0.0021", "0.0525", *"----", "0.0525", "0", "1 h 2 min"],
        ["logit_kd", "2", "0.0525", "0.0021", "0.0525", "-0.0012", "-0.0031 to +0.0007", "0.21",
         "+0.0003", "0.0525", "12,345", "1 h 2 min"],
    ]  # fmt: skip
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3] == ""
    assert lines[4].startswith("logit_kd, the best on validation, cannot be told apart from ce on")
    assert lines[5].startswith("- logit_kd cannot be told apart from ce: -0.0012 (-2.0 %), over ")
    assert lines[6] == "What this cannot tell:"
