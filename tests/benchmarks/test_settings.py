"""Options of the benchmarks."""

import argparse

import pytest

from cotrain.benchmarks.settings import (
    BulkSettings,
    CatalogueSettings,
    ParitySettings,
    StudentSettings,
    TeacherSettings,
    add_options,
    read_options,
)
from cotrain.errors import ConfigError


def parsed(settings: type, *argv: str):
    parser = argparse.ArgumentParser()
    add_options(parser, settings)
    return read_options(parser.parse_args(argv), settings)


@pytest.mark.parametrize(
    "settings",
    [StudentSettings, CatalogueSettings, BulkSettings, TeacherSettings, ParitySettings],
)
def test_without_options_the_defaults_hold(settings: type):
    assert parsed(settings) == settings()


def test_options_become_settings_of_their_type():
    given = parsed(
        StudentSettings, "--hidden-size", "64", "--loss", "gbce", "--max-steps", "3", "--json", "f"
    )
    assert given == StudentSettings(hidden_size=64, loss="gbce", max_steps=3, json="f")
    given = parsed(CatalogueSettings, "--sizes", "100", "2000", "--losses", "bce")
    assert given == CatalogueSettings(sizes=(100, 2000), losses=("bce",))


def test_a_switch_needs_no_value():
    given = parsed(TeacherSettings, "--exactness", "--rows", "8", "256", "--quantization", "bf16")
    assert given == TeacherSettings(exactness=True, rows=(8, 256), quantization=("bf16",))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memory", "--loop"], "--memory and --loop"),
        (["--memory", "--exactness"], "--exactness belongs"),
        (["--model", "7b", "--exactness"], "--exactness needs trained weights"),
        (["--model", "7b", "--loop"], "--loop needs a model to load"),
        (["--model", "7b", "--quantization", "nf4", "int8"], "made in nf4 or bf16"),
        (["--model", "7b", "--compute", "fp32"], "computes in bf16"),
    ],
)
def test_what_cannot_be_measured_together_is_refused(argv: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        parsed(TeacherSettings, *argv)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        parsed(
            StudentSettings,
            "--repeats", "0", "--hidden-size", "6", "--dropout", "1", "--items", "items.csv",
        )  # fmt: skip
    for part in (
        "4 mistake(s)", "--repeats is 0; expected ≥ 1", "--dropout is 1.0; expected ≥ 0 and < 1",
        "--hidden-size 6 is not a multiple of --num-heads 4", "--items is set without",
    ):  # fmt: skip
        assert part in str(error.value)


def test_every_one_of_several_values_is_checked():
    with pytest.raises(ConfigError, match=r"--sizes is 7; expected ≥ 100"):
        parsed(CatalogueSettings, "--sizes", "1000", "7")
