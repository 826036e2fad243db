"""Means, quantiles and standard errors of rows, and the strictness of the JSON."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from logitless.cli.results import write_json
from logitless.cli.statistics import clustered_error, distribution, model_summary, naive_error


def test_clustered_error_of_single_values_is_the_naive_one() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert naive_error(values) == pytest.approx(stats.sem(values), rel=1e-14)
    assert clustered_error(values, np.arange(50)) == pytest.approx(stats.sem(values), rel=1e-14)


def test_clustered_error_counts_repeated_values_once() -> None:
    values = np.random.default_rng(1).normal(size=20)
    repeated, clusters = np.repeat(values, 30), np.repeat(np.arange(20) * 7, 30)
    assert clustered_error(repeated, clusters) == pytest.approx(stats.sem(values), rel=1e-13)
    naive = naive_error(repeated)
    assert naive is not None
    assert naive < stats.sem(values) / 5


def test_too_few_values_have_no_error() -> None:
    assert naive_error(np.array([1.0])) is None
    assert clustered_error(np.array([1.0, 2.0]), np.array([3, 3])) is None


def test_distribution_interpolates_quantiles() -> None:
    found = distribution(np.arange(1001.0))
    assert found == {"mean": 500, "median": 500, "p90": 900, "p99": 990, "p99_9": pytest.approx(999), "max": 1000}


def test_model_summary_units() -> None:
    summary = model_summary(np.full(8, math.log(4)), np.full(8, 0.5), 4)
    assert summary == {
        "tokens": 8,
        "bytes": 4,
        "cross_entropy": pytest.approx(math.log(4)),
        "bits_per_byte": pytest.approx(4),
        "perplexity": pytest.approx(4),
        "mean_entropy": 0.5,
    }


def test_a_perplexity_too_large_for_a_float_is_infinite() -> None:
    assert model_summary(np.array([1e4]), np.array([0.0]), 1)["perplexity"] == math.inf


def test_json_has_no_literal_that_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        write_json({"a": [math.inf, -math.inf, math.nan, 1.5], "b": {"c": None}}, file)
    assert json.loads(path.read_text()) == {"a": ["inf", "-inf", "nan", 1.5], "b": {"c": None}}
