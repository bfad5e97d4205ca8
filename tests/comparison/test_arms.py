"""Arms: what each sets, that nothing else differs, and what is refused before anything starts."""

from pathlib import Path

import pytest

from cotrain.comparison.arms import ARMS, make_plan
from cotrain.config import Config, leaves
from cotrain.errors import ConfigError

RECIPES = Path(__file__).parent.parent.parent / "scripts" / "recipes"
STORE = ("--distill.rationales", "some/store")


def value(config: Config, name: str):
    for part in name.split("."):
        # `with` is a word of Python, and so the field has another name.
        config = getattr(config, part if hasattr(config, part) else f"{part}_")
    return config


def differing(one: Config, other: Config) -> set[str]:
    names = [leaf.name for leaf in leaves()]
    return {name for name in names if value(one, name) != value(other, name)}


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("ce", (None, None, 0.0)),
        ("logit_kd", ("some-teacher", None, 0.0)),
        ("rdr", (None, "some/store", 0.1)),
        ("decision_state", ("some-teacher", None, 0.0)),
        ("ranking", ("some-teacher", None, 0.0)),
        ("full", ("some-teacher", "some/store", 0.1)),
        ("offline", ("some-teacher", None, 0.0)),
        ("nearness", ("some-teacher", None, 0.0)),
        ("rdr_gram", (None, "some/store", 0.1)),
        ("rdr_centred", (None, "some/store", 0.1)),
        ("rdr_whitened", (None, "some/store", 0.1)),
    ],
)
def test_each_arm_learns_from_what_it_says(plan, arm, expected):
    made = plan(",".join(ARMS), 1, *STORE)
    config = next(run.config for run in made.runs if run.arm == arm)
    distill = config.distill
    assert (config.teacher.model, distill.rationales, distill.lambda_rdr) == expected
    weights = {"logit_kd": (0.1, 0.0), "decision_state": (0.0, 0.001), "full": (0.1, 0.001)}
    blends = ("ranking", "offline", "nearness")
    weights |= dict.fromkeys(blends, weights["logit_kd"])
    assert (distill.target == "blend") == (arm in blends)
    assert (distill.ranker == "nearness") == (arm == "nearness")
    assert (config.query.when == "offline") == (arm == "offline")
    if arm in weights:
        assert (distill.lambda_rank, distill.lambda_emb) == weights[arm]
    assert (distill.rdr_form == "gram") == (arm == "rdr_gram")
    targets = {"rdr_centred": "centred", "rdr_whitened": "whitened"}
    assert distill.rdr_targets == targets.get(arm, "plain")


def test_the_yardstick_needs_no_language_model(plan):
    made = plan("ce,nearness", 1, "--teacher.model", "none")
    assert [run.config.has_teacher for run in made.runs] == [False, True]
    # With it for all arms, they differ in how they teach.
    settings = ("--teacher.model", "none", "--distill.ranker", "nearness")
    made = plan("ce,logit_kd,ranking,offline", 1, *settings)
    assert [run.config.has_teacher for run in made.runs] == [False, True, True, True]


def test_nothing_else_differs_between_arms_or_seeds(plan):
    made = plan(",".join(ARMS), 3, *STORE, "--train.epochs", "7", "--train.warmup_epochs=2")
    assert [run.seed for run in made.runs] == [seed for seed in range(3) for _ in ARMS]
    first = made.runs[0].config
    assert first.train.epochs == 7
    for run in made.runs:
        names = differing(run.config, made.base) - {"seed", "output_dir"}
        assert names <= set(made.settings[run.arm])
        assert run.config.seed == run.seed
        assert run.config.output_dir == str(run.folder)
    assert len({run.folder for run in made.runs}) == len(made.runs)


def test_a_weight_of_rationales_that_is_given_holds(plan):
    made = plan("ce,rdr,full", 1, *STORE, "--distill.lambda_rdr", "0.03")
    assert [run.config.distill.lambda_rdr for run in made.runs] == [0.0, 0.03, 0.03]


def test_without_names_all_arms_that_can_run_do(recipe, tmp_path):
    without = make_plan(recipe, [], None, [0], tmp_path)
    assert without.arms == ("ce", "logit_kd", "decision_state", "ranking")
    unaudited = make_plan(recipe, ["--distill.audit", "off"], None, [0], tmp_path)
    assert unaudited.arms == ("ce", "logit_kd", "decision_state")
    complete = make_plan(recipe, STORE, None, [0], tmp_path)
    assert complete.arms == ("ce", "logit_kd", "rdr", "decision_state", "ranking", "full")
    alone = make_plan(recipe, [*STORE, "--teacher.model", "none"], None, [0], tmp_path)
    assert alone.arms == ("ce", "rdr")
    with pytest.raises(ConfigError, match="only ce can run"):
        make_plan(recipe, ["--teacher.model", "none"], None, [0], tmp_path)


def test_each_value_that_is_varied_is_an_arm_like_the_last_but_for_it(plan):
    vary = ("distill.lambda_rank=0.05,0.1", "teacher.adapter=some/folder,none")
    made = plan("ce,ranking", 1, vary=vary)
    # 0.1 and none are what the recipe has: that arm is there already.
    names = ("ranking+lambda_rank=0.05", "ranking+adapter=some_folder")
    assert made.arms == ("ce", "ranking", *names)
    configs = {run.arm: run.config for run in made.runs}
    assert differing(configs["ranking"], configs[names[0]]) == {"distill.lambda_rank", "output_dir"}
    assert differing(configs["ranking"], configs[names[1]]) == {"teacher.adapter", "output_dir"}
    assert configs[names[1]].teacher.adapter == "some/folder"
    assert made.defined[names[0]].asks
    like = plan("ce,logit_kd,ranking", 1, vary=vary[:1], vary_arm="logit_kd")
    assert like.arms == ("ce", "logit_kd", "ranking", "logit_kd+lambda_rank=0.05")


@pytest.mark.parametrize(
    ("vary", "vary_arm", "message"),
    [
        ("distill.lambda_rank", None, "names no values; expected SETTING=VALUE,VALUE"),
        ("distill.lambda_rank=0.1,", None, "names no values"),
        ("seed=1,2", None, "--vary seed cannot be done: seeds run from --first_seed"),
        ("distill.lambda_rang=0.1", None, "nearest known one is 'distill.lambda_rank'"),
        ("distill.lambda_rank=-1", None, "distill.lambda_rank is -1.0; expected ≥ 0"),
        ("distill.lambda_rank=0.3", "full", "--vary_arm full is none of the arms ce, ranking"),
    ],
)
def test_what_cannot_be_varied_is_refused(plan, vary, vary_arm, message):
    with pytest.raises(ConfigError, match=message):
        plan("ce,ranking", 1, vary=(vary,), vary_arm=vary_arm)


@pytest.mark.parametrize("name", ["quickstart", "ml-1m", "amazon-beauty"])
def test_every_recipe_can_be_compared(name):
    options = [*STORE, "--teacher.model", "some-teacher"]
    made = make_plan(RECIPES / f"{name}.yaml", options, list(ARMS), [0, 1], None)
    assert len(made.runs) == 2 * len(ARMS)
    assert made.output == Path("comparisons") / made.base.data.name


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        ("ce,rdr", (), "rdr: it needs --distill.rationales STORE"),
        ("ce,full", ("--teacher.model", "none", *STORE), "full: it asks a live teacher"),
        ("ce,logit_kd", ("--distill.lambda_rank", "0"), "logit_kd: it learns by distill.lambda_ra"),
        ("ce,decision_state", ("--distill.lambda_emb=0",), "by distill.lambda_emb, which is 0"),
        ("ce,logit_kd", ("--teacher.mode", "generate"), "generate gives none"),
        ("ce,rdr,rdr_gram", (*STORE, "--distill.rdr_form", "gram"), "the very settings of rdr"),
        ("ce,rank", (), "unknown arms 'rank'; known are ce, logit_kd"),
        ("ce,ranking", ("--distill.audit", "off"), "ranking: it learns a blend that the audit fit"),
        ("logit_kd,rdr", (), "lacks ce"),
        ("ce,logit_kd,ce", (), "names an arm twice"),
        ("ce,logit_kd", ("--seed", "3"), "--first_seed"),
        ("ce,logit_kd", ("--output_dir=x",), "with --output"),
        ("ce,logit_kd", ("--config", "x.yaml"), "--recipe"),
        ("ce,logit_kd", ("--train.epoch", "3"), "nearest known one is 'train.epochs'"),
        ("ce,logit_kd", ("--student.item_text", "teacher"), "ce: .*teacher.model is none"),
    ],
)
def test_what_cannot_run_is_refused(plan, arms, options, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        plan(arms, 1, *options)


def test_all_arms_that_cannot_run_are_named_at_once(plan):
    with pytest.raises(ConfigError) as caught:
        plan("ce,logit_kd,rdr,full", 1, "--distill.lambda_rank", "0")
    text = str(caught.value)
    assert all(f"- {name}: " in text for name in ("logit_kd", "rdr", "full"))


def test_a_recipe_with_a_seed_of_its_own_is_refused(recipe, tmp_path):
    recipe.write_text(recipe.read_text() + "seed: 3\n")
    with pytest.raises(ConfigError, match="sets seed or output_dir"):
        make_plan(recipe, [], ["ce", "logit_kd"], [0], tmp_path)
