"""The benchmark over catalogue sizes."""

import dataclasses
import sys

import numpy as np
import pytest

from cotrain.benchmarks import catalogue
from cotrain.benchmarks.catalogue_worker import random_interactions
from cotrain.benchmarks.processes import run_worker
from cotrain.benchmarks.settings import CatalogueSettings


def test_random_interactions_have_the_size_asked_for_and_a_few_popular_items():
    data = random_interactions(num_items=500, num_users=40, history_length=20, seed=0)
    assert (data.num_items, data.num_users) == (500, 40)
    assert {len(data.train_history(user)) - 1 for user in range(40)} == {20}
    assert 1 <= data.items.min() <= data.items.max() <= 500
    counts = np.sort(np.bincount(data.items, minlength=501)[1:])[::-1]
    # Zipf: the most popular item of 500 has 1 / H(500) = 15 % of 920 draws.
    assert counts[0] == pytest.approx(920 * 0.147, abs=40)
    assert counts[:50].sum() > 0.5 * counts.sum()


def test_a_point_is_measured():
    settings = CatalogueSettings(
        hidden_size=8, history_length=5, batch_size=4, steps=1, k=3, num_negatives=16
    )
    point = {"items": 300, "loss": "sampled_softmax", "item_updates": "lazy"}
    job = dataclasses.asdict(settings) | point | {"threads": 1}
    command = [sys.executable, "-m", "cotrain.benchmarks.catalogue_worker"]
    point |= run_worker(command, job, threads=1)
    assert point["step_s"] > 0
    assert point["retrieval_s"] > 0
    assert 0 < point["before_mb"] <= point["trained_mb"] <= point["peak_mb"]
    assert catalogue.point_line(point).split()[:3] == ["300", "sampled_softmax", "lazy"]


def test_a_point_without_a_result_says_why():
    point = {"items": 2_000_000, "loss": "ce", "item_updates": "all", "error": "was killed"}
    assert catalogue.point_line(point).split() == ["2,000,000", "ce", "all", "was", "killed"]
