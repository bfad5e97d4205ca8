"""The use from Python, as its examples have it."""

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import cotrain
from cotrain import api
from cotrain.errors import ConfigError, DataError

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def with_small_ones(finished_run: Path, tiny_teacher: str) -> Any:
    """A small run and a small teacher in place of the names in examples."""

    def replaced(text: str) -> str:
        text = re.sub(r"runs/(NAME|ml-100k-…)", str(finished_run), text)
        return text.replace("smollm2-135m-instruct", tiny_teacher)

    return replaced


@pytest.mark.parametrize("name", ["", "load_run", "load_teacher"])
def test_examples_of_docstrings(name: str, with_small_ones: Any):
    text = (getattr(api, name) if name else api).__doc__
    examples = doctest.DocTestParser().get_doctest(with_small_ones(text), {}, name, None, 0)
    assert examples.examples
    said: list[str] = []
    runner = doctest.DocTestRunner()
    assert runner.run(examples, out=said.append).failed == 0, "".join(said)


def test_examples_of_the_readme(with_small_ones: Any):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert any("load_run" in block for block in blocks)
    for block in blocks:
        exec(with_small_ones(block), {})


def test_everything_offered_is_there():
    for name in cotrain.__all__:
        assert getattr(cotrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cotrain.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_one_user_at_a_time(finished_run: Path):
    run = cotrain.load_run(finished_run)
    wrong: list[dict[str, Any]] = [{}, {"user": 8, "items": [50]}, {"user": 8, "k": 0}]
    for given in wrong:
        with pytest.raises(ConfigError, match="expected one of user, items and titles"):
            run.recommend(**given)
    with pytest.raises(DataError, match="have no user '999'"):
        run.recommend(user=999)
    with pytest.raises(DataError, match="nearest are 'Toy Story"):
        run.recommend(titles=["Toy Stroy"])
    assert run.recommend(user=8, k=3).items == run.recommend(user=8, k=9).items[:3]
    comedies = run.recommend(items=[50], k=5, categories=["comedy"]).items
    assert all("Comedy" in item.categories for item in comedies)
    assert run.report["shipped"] == "student"


def test_a_teacher_is_asked_about_items_it_knows(finished_run: Path, tiny_teacher: str):
    catalog = cotrain.load_run(finished_run).recommender.catalog
    teacher = cotrain.load_teacher(
        tiny_teacher, catalog, num_candidates=3, quantization="fp32", template="movies"
    )
    ranked = teacher.rank([[50], [1, 4]], [[7, 8, 9], [9, 8, 7]])
    assert [sorted(row) for row in ranked.item_ids] == [[7, 8, 9]] * 2
    best = ranked.verdict.probs.argmax(1)
    assert [row[0] for row in ranked.item_ids] == [[7, 8, 9][best[0]], [9, 8, 7][best[1]]]
    assert torch.equal(ranked.candidates[0].flip(0), ranked.candidates[1])
    for histories, candidates in (([[50]], [[7, 8]]), ([[50]], [[7, 7, 8]]), ([], [[7, 8, 9]])):
        with pytest.raises(DataError, match="3 different items"):
            teacher.rank(histories, candidates)
    with pytest.raises(DataError, match="catalogue lacks: 'who'"):
        teacher.rank([["who"]], [[7, 8, 9]])
    with pytest.raises(DataError, match="rows without items"):
        teacher.rank([[]], [[7, 8, 9]])


@pytest.mark.parametrize(
    "settings",
    [{"quantization": "nf5"}, {"num_candidates": 1}, {"num_candidates": 10**6}, {"x": 1}],
)
def test_settings_that_no_teacher_has(settings: dict[str, Any], finished_run: Path):
    catalog = cotrain.load_run(finished_run).recommender.catalog
    with pytest.raises(ConfigError):
        cotrain.load_teacher("smollm2-135m-instruct", catalog, **settings)
