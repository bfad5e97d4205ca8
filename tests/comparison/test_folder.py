"""A comparison's folder: what it remembers, what it refuses, and who may work in it."""

import shutil

import pytest
import yaml

from cotrain import config as configuration
from cotrain.comparison.folder import RESULT, locked, remember, stage
from cotrain.errors import ConfigError


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_the_same_settings_go_on(plan, output):
    assert remember(plan()) == []
    assert remember(plan()) == []
    memory = yaml.safe_load((output / "comparison.yaml").read_text())
    assert memory["seeds"] == [0, 1]
    assert list(memory["arms"]) == ["ce", "logit_kd", "decision_state"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("ce,logit_kd,decision_state", 2, "--train.epochs", "41"), "train.epochs: 40 there, 41"),
        (("ce,logit_kd,decision_state", 1), "seeds: 1 there"),
        (("ce,logit_kd", 2), "arms: 'decision_state' there"),
    ],
)
def test_other_settings_are_refused(plan, output, change, named):
    remember(plan())
    before = (output / "comparison.yaml").read_text()
    with pytest.raises(ConfigError, match=named):
        remember(plan(*change))
    assert (output / "comparison.yaml").read_text() == before


def test_another_weight_of_an_arm_is_refused(plan, output):
    store = ("--distill.rationales", "store")
    remember(plan("ce,rdr", 1, *store))
    with pytest.raises(ConfigError, match=r"distill\.lambda_rdr"):
        remember(plan("ce,rdr", 1, *store, "--distill.lambda_rdr", "0.2"))


def test_what_is_added_after_results_were_seen_is_noted(plan, output):
    remember(plan("ce,logit_kd", 1))
    # nothing was seen yet
    assert remember(plan("ce,logit_kd", 2)) == []
    (output / RESULT).write_text("{}")
    added = ["arm decision_state", "seed 2"]
    assert remember(plan("ce,logit_kd,decision_state", 3)) == added
    # and stays noted when the same command is given again
    assert remember(plan("ce,logit_kd,decision_state", 3)) == added


def test_a_setting_of_a_later_version_had_its_default_before(plan, output):
    remember(plan())
    path = output / "comparison.yaml"
    memory = yaml.safe_load(path.read_text())
    del memory["settings"]["train.epochs"]
    path.write_text(yaml.safe_dump(memory))
    assert remember(plan()) == []
    path.write_text(yaml.safe_dump(memory))
    with pytest.raises(ConfigError, match=r"train\.epochs: 40 there, 41 now"):
        remember(plan("ce,logit_kd,decision_state", 2, "--train.epochs", "41"))


def test_a_folder_of_something_else_is_left_alone(plan, output):
    (output / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds other files"):
        remember(plan())
    (output / "comparison.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="cannot be read"):
        remember(plan())


def test_nobody_else_works_there_meanwhile(output):
    with locked(output), pytest.raises(ConfigError, match="is in use"), locked(output):
        pass
    with locked(output):
        pass


def test_stages_of_a_run(plan):
    run = plan().runs[0]
    assert stage(run) == "new"
    run.folder.mkdir(parents=True)
    assert stage(run) == "begun"
    configuration.save(run.config, run.folder / "config.yaml")
    assert stage(run) == "begun"
    (run.folder / "checkpoints" / "step_3").mkdir(parents=True)
    assert stage(run) == "interrupted"
    (run.folder / "report.json").write_text("{}")
    assert stage(run) == "finished"


def test_the_same_settings_may_be_written_in_another_order(plan):
    run = plan().runs[0]
    (run.folder / "checkpoints" / "step_3").mkdir(parents=True)
    text = yaml.safe_dump(configuration.to_dict(run.config), sort_keys=True)
    (run.folder / "config.yaml").write_text(text)
    assert stage(run) == "interrupted"


def test_a_run_of_other_settings_is_not_taken_for_one_of_these(plan):
    first, second = plan().runs[:2]
    second.folder.mkdir(parents=True)
    configuration.save(first.config, second.folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"teacher\.model: None there, 'some-teacher' now"):
        stage(second)
    other = plan().runs[4]
    shutil.copytree(second.folder, other.folder)
    configuration.save(plan().runs[1].config, other.folder / "config.yaml")
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        stage(other)
