"""Reasons for recommendations: the nearest, those that fit an item, and how often they agree."""

import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cotrain import config as configuration
from cotrain.config import Config, DataConfig
from cotrain.data.interactions import InteractionData
from cotrain.errors import CheckpointError, ConfigError, DataError
from cotrain.evaluation.compare import paired_bootstrap
from cotrain.rationale import explain
from cotrain.rationale.agreement import Agreement, measure_agreement
from cotrain.rationale.explain import Explainer
from cotrain.rationale.head import FOLDER, RationaleHead
from cotrain.rationale.store import RationaleStore
from cotrain.student.recommender import Recommender
from cotrain.student.sasrec import SASRec

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "recommend.py"
specification = importlib.util.spec_from_file_location("recommend", SCRIPT)
assert specification is not None
assert specification.loader is not None
recommend = importlib.util.module_from_spec(specification)
specification.loader.exec_module(recommend)

SIZE = 16


@pytest.fixture(scope="module")
def recommender(small_data: InteractionData) -> Recommender:
    """Untrained, but items of like categories have like vectors."""
    torch.manual_seed(0)
    catalog = small_data.catalog
    names = sorted({name for text in catalog.categories for name in text.split("|")} - {""})
    model = SASRec(
        small_data.num_items, SIZE, num_layers=1, num_heads=1, max_length=20, dropout=0.3
    )
    of_name = torch.randn(len(names), SIZE)
    with torch.no_grad():
        for item in range(1, len(catalog)):
            mine = [names.index(name) for name in catalog.categories[item].split("|") if name]
            model.item_vectors[item] += of_name[mine].sum(0)
    return Recommender(model, catalog)


@pytest.fixture
def make_explainer(
    small_data: InteractionData, make_rationale: Any, make_store: Any, recommender: Recommender
) -> Callable[..., Explainer]:
    """Every seventh training interaction has a reason; its vector is that of its source item in
    the student, and W_r leaves states as they are."""

    def make(
        step: int = 7, vectors: Any = None, whitening: Any = None, name: str = "store"
    ) -> Explainer:
        data = small_data
        ends = data.held_out.train_end - data.offsets[:-1]
        positions = [(user, cut) for user in range(data.num_users) for cut in range(1, ends[user])]
        chosen = positions[::step]
        # In no order, so that a row is not taken for a place.
        chosen = [chosen[row] for row in np.random.default_rng(0).permutation(len(chosen))]
        if vectors is None:
            items = [data.history(user)[cut] for user, cut in chosen]
            vectors = recommender.model.item_vectors.detach().numpy()[items]
            # No two alike, so that there is one order.
            vectors = vectors + np.random.default_rng(1).normal(size=vectors.shape) / 100
        rationales = [make_rationale(data, *position) for position in chosen]
        matched = RationaleStore.open(make_store(rationales, vectors, name)).match(data)
        head = RationaleHead(SIZE, torch.zeros(matched.store.dimension), whitening)
        with torch.no_grad():
            head.linear.weight.copy_(torch.eye(matched.store.dimension, SIZE))
        return Explainer(recommender, head, matched, data)

    return make


def states_of(explainer: Explainer, users: list[int]) -> torch.Tensor:
    model = explainer.recommender.model.eval()
    with torch.no_grad():
        return model.user_states([explainer.data.history(user) for user in users])


def all_cosines(explainer: Explainer, users: list[int]) -> np.ndarray:
    """(B, n) by one product."""
    store = explainer.store
    targets = explainer.head.targets(store.vectors(np.arange(len(store))))
    everybody = explainer.data.trained_users.tolist()
    model = explainer.recommender.model.eval()
    with torch.no_grad():
        predicted = F.normalize(explainer.head(states_of(explainer, users)), dim=1)
        states = [model.user_states([explainer.data.train_history(user)]) for user in everybody]
        common = F.normalize(explainer.head(torch.cat(states)), dim=1).mean(0)
    predicted = F.normalize(predicted - common, dim=1)
    return (predicted @ F.normalize(targets - targets.mean(0), dim=1).T).numpy()


# ---- the nearest --------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "scores"), [(2**14, 2**24), (7, 2**24), (100, 30), (1, 1)])
@pytest.mark.parametrize("whitened", [False, True])
def test_the_nearest_are_those_of_the_whole_store(
    make_explainer, monkeypatch, rows, scores, whitened
):
    monkeypatch.setattr(explain, "MAX_ROWS", rows)
    monkeypatch.setattr(explain, "MAX_SCORES", scores)
    explainer = make_explainer(60, whitening=torch.rand(SIZE, SIZE) if whitened else None)
    users = [3, 0, 59]
    expected = all_cosines(explainer, users)
    found, cosines = explainer.nearest(states_of(explainer, users), 6)
    assert found.shape == (3, 6)
    np.testing.assert_allclose(cosines, -np.sort(-expected, 1)[:, :6], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(expected, found, 1), cosines, atol=1e-6)


def test_a_users_own_can_be_left_out(make_explainer):
    explainer = make_explainer()
    users = [5, 6]
    size = len(explainer.store)
    found, cosines = explainer.nearest(states_of(explainer, users), size, users)
    for user, rows, near in zip(users, found, cosines, strict=True):
        own = set(np.flatnonzero(explainer.owners == user).tolist())
        assert own
        assert set(rows.tolist()) == set(range(size)) - own | {-1}
        assert (rows[-len(own) :] == -1).all()
        assert np.isneginf(near[-len(own) :]).all()
        assert np.isfinite(near[: -len(own)]).all()


def test_what_all_have_in_common_makes_no_reason_the_nearest(make_explainer):
    """Regression: a handful of rationales near the mean were the nearest of hundreds of users."""
    everybody = list(range(60))
    vectors = np.random.default_rng(2).normal(size=(len(make_explainer().store), SIZE))
    alone = make_explainer(vectors=vectors, name="alone")
    common = make_explainer(vectors=20 + 3 * vectors, name="common")
    with torch.no_grad():
        common.head.linear.bias.fill_(20)
    nearest = [one.nearest(states_of(one, everybody), 1)[0][:, 0] for one in (alone, common)]
    assert len(set(nearest[1].tolist())) > 0.7 * len(set(nearest[0].tolist()))


def test_owners_and_source_items_are_those_of_the_keys(make_explainer, small_data):
    explainer = make_explainer()
    keys = explainer.store.keys
    assert [small_data.user_ids[user] for user in explainer.owners] == keys["user_id"].to_list()
    ids = [small_data.catalog.item_ids[item] for item in explainer.source_items]
    assert ids == keys["item_id"].to_list()


# ---- those that fit -----------------------------------------------------------------------------


def test_of_the_same_item_first_then_of_the_most_like(make_explainer):
    explainer = make_explainer()
    vectors = F.normalize(explainer.recommender.model.item_vectors.detach(), dim=1)
    rows = np.random.default_rng(0).choice(len(explainer.store), 40, replace=False)
    sources = explainer.source_items[rows]
    items = np.array([sources[17], 1, 2])
    order, likeness = explainer.fitting(items, rows)
    for item, places, likes in zip(items, order, likeness, strict=True):
        found = sources[places]
        same = found == item
        assert (np.diff(same.astype(int)) <= 0).all()
        expected = vectors[found] @ vectors[item]
        np.testing.assert_allclose(likes, expected, atol=1e-5)
        assert (np.diff(likes[~same]) <= 0).all()
        for place, after in itertools.pairwise(places):
            # Of one source item the nearer to the user stays before.
            assert sources[place] != sources[after] or place < after
    assert sources[order[0, 0]] == items[0]


# ---- explanations -------------------------------------------------------------------------------


def test_every_item_has_the_reason_that_fits_it_best(make_explainer, small_data):
    explainer = make_explainer()
    users = [0, 7, 23]
    explanations = explainer.explain(users, k=5, reasons=2, overall=4, pool=12)
    cosines = all_cosines(explainer, users)
    for user, row_cosines, explanation in zip(users, cosines, explanations, strict=True):
        assert explanation.user_id == small_data.user_ids[user]
        raw = [small_data.catalog.item_ids[item] for item in small_data.history(user)]
        recommended = explainer.recommender.recommend([raw], k=5)
        assert [item.item_id for item in explanation.items] == recommended.item_ids[0]
        assert [item.score for item in explanation.items] == pytest.approx(recommended.scores[0])
        pool = np.argsort(-row_cosines)[:12]
        texts = [written.rationale for written in explainer.store.texts(pool)]
        new = [row for place, row in enumerate(pool) if texts[place] not in texts[:place]]
        assert [reason.row for reason in explanation.nearest] == new[:4]
        for item in explanation.items:
            index = small_data.catalog.item_ids.index(item.item_id)
            assert item.title == small_data.catalog.titles[index]
            places, likeness = explainer.fitting(np.array([index]), pool)
            assert [reason.row for reason in item.reasons] == pool[places[0, :2]].tolist()
            assert [r.likeness for r in item.reasons] == pytest.approx(likeness[0, :2].tolist())
        for reason in [
            *explanation.nearest,
            *(r for item in explanation.items for r in item.reasons),
        ]:
            (written,) = explainer.store.texts(np.array([reason.row]))
            assert (reason.text, reason.item_id) == (written.rationale, written.item_id)
            assert reason.title in reason.text  # as these were written
            assert reason.cosine == pytest.approx(row_cosines[reason.row], abs=1e-5)
            assert reason.own == (written.user_id == explanation.user_id)


def test_reasons_come_from_training_interactions_alone(make_explainer, small_data):
    """The leak guard, seen from what is shown."""
    explainer = make_explainer(step=1)
    shown = set()
    for explanation in explainer.explain(range(small_data.num_users), k=20, reasons=3, pool=200):
        shown |= {reason.row for item in explanation.items for reason in item.reasons}
        shown |= {reason.row for reason in explanation.nearest}
    keys = explainer.store.keys[sorted(shown)]
    assert len(shown) > 100
    for user_id, cut in keys.select("user_id", "cut").iter_rows():
        user = small_data.user_ids.index(user_id)
        assert 1 <= cut < len(small_data.history(user)) - 2


def test_own_reasons_can_be_left_out_of_explanations(make_explainer):
    explainer = make_explainer(step=1)
    users = list(range(20))
    of_all = explainer.explain(users, overall=50)
    assert any(reason.own for explanation in of_all for reason in explanation.nearest)
    for explanation in explainer.explain(users, exclude_own=True):
        assert explanation.nearest
        assert not any(reason.own for reason in explanation.nearest)
        assert not any(reason.own for item in explanation.items for reason in item.reasons)


def test_a_store_smaller_than_what_is_asked_for_is_shown_whole(make_explainer):
    explainer = make_explainer(step=1000)
    size = len(explainer.store)
    (explanation,) = explainer.explain([0], k=3, reasons=50, overall=50)
    assert len(explanation.nearest) == size
    assert [len(item.reasons) for item in explanation.items] == [size] * 3


def test_what_does_not_belong_together_is_refused(make_explainer, recommender, small_data):
    explainer = make_explainer()
    matched = explainer.store.match(small_data)
    with pytest.raises(DataError, match="from 16 to 12 numbers"):
        Explainer(recommender, RationaleHead(SIZE, torch.zeros(12)), matched, small_data)
    with pytest.raises(DataError, match="from 8 to 16 numbers"):
        Explainer(recommender, RationaleHead(8, torch.zeros(SIZE)), matched, small_data)
    catalog = small_data.catalog
    others = [None, *reversed(catalog.item_ids[1:])]
    other = dataclasses.replace(small_data, catalog=dataclasses.replace(catalog, item_ids=others))
    with pytest.raises(DataError, match="not the same ones in the same order"):
        Explainer(recommender, explainer.head, matched, other)


# ---- agreement ----------------------------------------------------------------------------------


def as_report(agreement: Agreement) -> dict[str, Any]:
    return agreement.as_report(lambda a, b: paired_bootstrap(a, b, samples=2000).as_dict())


def test_reasons_near_in_categories_agree_more_than_random_ones(make_explainer):
    # From many random reasons, too, one can be chosen that fits an item.
    report = as_report(measure_agreement(make_explainer(), pool=4))
    for name in ("nearest", "shown"):
        found = report[name]
        assert found["users"] == 60
        assert found["share"] > found["random"] + 0.1
        assert found["difference"] == pytest.approx(found["share"] - found["random"])
        assert found["ci95"][0] > 0
    assert (report["k"], report["pool"], report["own_excluded"]) == (10, 4, True)


def test_reasons_that_mean_nothing_agree_as_random_ones_do(make_explainer):
    # Users who are alike share their nearest reasons, so one draw of noise may go either way.
    size, draw = len(make_explainer().store), np.random.default_rng(5)
    found = [
        measure_agreement(
            make_explainer(vectors=draw.normal(size=(size, SIZE)), name=f"noise-{number}")
        )
        for number in range(8)
    ]
    for name in ("nearest", "shown"):
        differences = [
            (getattr(one, name) - getattr(one, f"{name}_random")).mean() for one in found
        ]
        assert abs(np.mean(differences)) < 3 * np.std(differences, ddof=1) / 8**0.5
        assert abs(np.mean(differences)) < 0.1


def test_shares_are_those_counted_one_by_one(make_explainer, small_data, recommender):
    explainer = make_explainer()
    found = measure_agreement(explainer, k=4, pool=9, limit=25, exclude_own=False, seed=3)
    assert len(found.users) == 25
    categories = [set(text.split("|")) - {""} for text in small_data.catalog.categories]
    for user, nearest, shown in zip(found.users, found.nearest, found.shown, strict=True):
        history = small_data.history_before(user, "test")
        items = recommender.top_items([history], 4).item_ids[0].tolist()
        with torch.no_grad():
            state = recommender.model.eval().user_states([history])
        rows = explainer.nearest(state, 9)[0][0]
        first = explainer.source_items[rows[0]]
        assert nearest == np.mean([bool(categories[i] & categories[first]) for i in items])
        hits = []
        for item in items:
            best = rows[explainer.fitting(np.array([item]), rows)[0][0, 0]]
            hits.append(bool(categories[item] & categories[explainer.source_items[best]]))
        assert shown == np.mean(hits)
    assert (found.nearest_random > 0).any()
    assert ((found.nearest_random >= 0) & (found.nearest_random <= 1)).all()
    again = measure_agreement(explainer, k=4, pool=9, limit=25, exclude_own=False, seed=3)
    np.testing.assert_array_equal(again.shown_random, found.shown_random)


def test_random_reasons_are_of_others_each_equally_often(make_explainer):
    explainer = make_explainer(step=40)
    size, draw = len(explainer.store), np.random.default_rng(0)
    for user in (0, 30, 59, None):
        others = np.flatnonzero(explainer.owners != user) if user is not None else np.arange(size)
        assert sorted(explainer.random_rows(user, size, draw)) == others.tolist()
        few = np.concatenate([explainer.random_rows(user, 5, draw) for _ in range(2000)])
        counts = np.bincount(few, minlength=size)[others]
        assert counts.sum() == 10_000
        expected = 10_000 / len(others)
        assert abs(counts - expected).max() < 6 * expected**0.5


def test_without_categories_there_is_no_agreement(make_explainer, small_data):
    explainer = make_explainer()
    catalog = dataclasses.replace(small_data.catalog, categories=[""] * len(small_data.catalog))
    explainer.data = dataclasses.replace(small_data, catalog=catalog)
    with pytest.raises(DataError, match="have no categories"):
        measure_agreement(explainer)


def test_a_category_that_most_items_have_says_nothing(make_explainer, small_data):
    # Regression: every item of Amazon Beauty is in "Beauty", and all reasons fitted all items.
    explainer = make_explainer()
    before = as_report(measure_agreement(explainer, pool=4))

    def with_categories(names: list[str]) -> Explainer:
        catalog = dataclasses.replace(small_data.catalog, categories=names)
        explainer.data = dataclasses.replace(small_data, catalog=catalog)
        return explainer

    rooted = [f"Beauty|{text}" for text in small_data.catalog.categories]
    assert as_report(measure_agreement(with_categories(rooted), pool=4)) == before
    with pytest.raises(DataError, match="more than half"):
        measure_agreement(with_categories(["Beauty"] * len(small_data.catalog)))


# ---- the script ---------------------------------------------------------------------------------


@pytest.fixture
def run_folder(
    tmp_path: Path, make_explainer: Any, small_tables: tuple[Path, Path], recommender: Recommender
) -> Path:
    """As a finished run leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    interactions, items = map(str, small_tables)
    config = Config(data=DataConfig(name="small", interactions=interactions, items=items))
    configuration.save(config, folder / "config.yaml")
    explainer = make_explainer()
    recommender.save_pretrained(folder / "student")
    explainer.head.save(folder / FOLDER, {"store": str(explainer.store.folder)})
    one = {"share": 0.62, "random": 0.5, "difference": 0.12, "ci95": [0.1, 0.14], "users": 60}
    report = {
        "shipped": "student",
        "rationales": {"agreement": {"student": {"nearest": one, "shown": one}}},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_the_script_prints_items_and_reasons(run_folder, capsys, make_explainer, small_data):
    assert recommend.main(["--run", str(run_folder), "--user", "8", "--k", "4", "--explain"]) == 0
    printed = capsys.readouterr().out
    explainer = make_explainer(name="again")
    (expected,) = explainer.explain([small_data.user_ids.index(8)], 4)
    assert printed.startswith("User 8, ")
    for rank, item in enumerate(expected.items, start=1):
        assert f"{rank:3}. {item.title}" in printed
        (reason,) = item.reasons
        assert f"{reason.cosine:.2f}  “{reason.text}” — written for {reason.title}" in printed
    assert "Nearest reasons, whatever is recommended:" in printed
    assert "the nearest reason: 62.0 % against 50.0 % at random; +12.0 points" in printed


def test_the_script_answers_machines(run_folder, capsys, make_explainer, small_data):
    argv = ["--run", str(run_folder), "--user", "8", "--explain", "--json", "--exclude-own"]
    assert recommend.main([*argv, "--reasons", "2", "--pool", "20"]) == 0
    answer = json.loads(capsys.readouterr().out)
    explainer = make_explainer(name="again")
    (expected,) = explainer.explain(
        [small_data.user_ids.index(8)], reasons=2, pool=20, exclude_own=True
    )
    assert answer["user_id"] == 8
    found = [[r["row"] for r in item["reasons"]] for item in answer["items"]]
    assert found == [[r.row for r in item.reasons] for item in expected.items]
    assert answer["agreement"]["nearest"]["share"] == 0.62


def test_the_script_recommends_without_reasons(run_folder, capsys):
    for path in (run_folder / FOLDER).iterdir():
        path.unlink()
    assert recommend.main(["--run", str(run_folder), "--user", "8", "--k", "3"]) == 0
    printed = capsys.readouterr().out
    assert "  3. " in printed
    assert "“" not in printed
    assert "  4. " not in printed


def test_the_script_measures_agreement(run_folder, capsys):
    argv = ["--run", str(run_folder), "--agreement", "--k", "5", "--pool", "4"]
    assert recommend.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["agreement"]
    assert (found["k"], found["pool"]) == (5, 4)
    assert found["shown"]["ci95"][0] > 0
    assert recommend.main(argv) == 0
    share = f"{100 * found['shown']['share']:.1f} %"
    assert f"the reason shown for the item: {share} against" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (["--user", "nobody"], DataError, r"no user 'nobody'.*60 users: 1, 2"),
        (["--user", "8", "--k", "0"], ConfigError, "--k is 0"),
        ([], ConfigError, "nothing to do"),
        (["--agreement", "--explain"], ConfigError, "--explain needs the --user"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_error(run_folder, options, error, said):
    with pytest.raises(error, match=said):
        recommend.main(["--run", str(run_folder), *options])


def test_runs_that_are_none_or_not_finished_or_without_reasons(run_folder, tmp_path):
    with pytest.raises(CheckpointError, match="no run folder"):
        recommend.main(["--run", str(tmp_path / "nowhere"), "--user", "8"])
    argv = ["--run", str(run_folder), "--user", "8", "--explain"]
    moved = (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"are not there\. Name their folder with --store"):
        recommend.main(argv)
    assert recommend.main([*argv, "--store", str(moved)]) == 0
    (run_folder / FOLDER).rename(run_folder / "other")
    with pytest.raises(DataError, match="trained without rationales"):
        recommend.main(argv)
    (run_folder / "student").rename(run_folder / "gone")
    with pytest.raises(CheckpointError, match="no student yet"):
        recommend.main(argv)


def test_a_run_whose_data_changed_is_refused(run_folder, small_tables, tmp_path):
    """Indices of the student would name other items."""
    interactions, items = small_tables
    lines = interactions.read_text().splitlines()
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    config = Config(data=DataConfig(name="small", interactions=str(fewer), items=str(items)))
    configuration.save(config, run_folder / "config.yaml")
    with pytest.raises(DataError, match="not the same ones in the same order"):
        recommend.main(["--run", str(run_folder), "--user", "8"])
