"""Errors of loading: all problems are reported together, by name and with numbers."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from outlook_common.weights import (
    WeightsError,
    resolve,
)
from outlook_common.weights.errors import Kind
from parity_tests.weights.layers import (
    IN_FLAX,
    TABLE,
    TWINS,
    WEIGHTS,
)


def change(**changes: Any) -> dict[str, Any]:
    """WEIGHTS with some changed; None leaves one out, and "__" stands for a dot."""
    source = WEIGHTS | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in source.items() if value is not None}


BROKEN: dict[str, tuple[dict[str, Any], Kind, list[str], str]] = {
    "missing": (change(v__weight=None), "missing", ["v.weight"], r"v.weight \(6, 6\)"),
    "unexpected": (change(v__scale=np.ones(6)), "unexpected", ["v.scale"], "v.scale"),
    "misshapen": (
        change(attn__weight=np.ones((6, 162))),
        "misshapen",
        ["attn.weight"],
        r"attn.weight: \(6, 162\), expected \(162, 6\)",
    ),
    "misshapen in Flax": (
        IN_FLAX | {"attn.kernel": np.ones((162, 6))},
        "misshapen",
        ["attn.kernel"],
        r"attn.kernel: \(162, 6\), expected \(6, 162\)",
    ),
    "duplicate": (
        change(v_pj__weight=np.ones((6, 6))),
        "duplicate",
        ["v_pj.weight"],
        "v_pj.weight is v.weight, and so is v.weight",
    ),
    "duplicate by separator": (IN_FLAX | {"v/bias": np.ones(6)}, "duplicate", ["v.bias"], "and so is v.bias"),
    "mixed naming": (
        change(v__weight=None, v__kernel=np.ones((6, 6))),
        "mixed naming",
        ["v.kernel"],
        "the other names are torch's, in which it is v.weight",
    ),
    "object": (change(v__bias=object()), "non-numeric", ["v.bias"], "v.bias: object"),
    "string": (change(v__bias="ones"), "non-numeric", ["v.bias"], "v.bias: str"),
    "None": ({**WEIGHTS, "v.bias": None}, "non-numeric", ["v.bias"], "v.bias: NoneType"),
    "ragged": (change(v__bias=[[1.0], [1.0, 2.0]]), "non-numeric", ["v.bias"], "v.bias: list is not an array"),
    "complex": (change(v__bias=np.ones(6, "c8")), "non-numeric", ["v.bias"], "v.bias: an array of complex64"),
    "integers": (change(v__bias=np.ones(6, "i8")), "non-numeric", ["v.bias"], "int64, expected floating-point"),
    "float8": (change(v__bias=torch.ones(6).to(torch.float8_e4m3fn)), "non-numeric", ["v.bias"], "float8_e4m3fn"),
    "sparse": (
        change(v__bias=torch.ones(6).to_sparse()),
        "non-numeric",
        ["v.bias"],
        "v.bias: a tensor of torch.float32",
    ),
    "meta": (change(v__bias=torch.ones(6, device="meta")), "non-numeric", ["v.bias"], "v.bias: .*meta"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_error_names_the_wrong_tensor(case: str) -> None:
    source, kind, names, words = BROKEN[case]
    with pytest.raises(WeightsError, match=words) as caught:
        resolve(source, TABLE)
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert caught.value.names(kind) == names


def test_all_problems_are_reported_at_once_with_counts_and_similar_names() -> None:
    source = {
        "v.wieght": np.ones((6, 6)),
        "v.bias": "none",
        "attn.weight": np.ones((6, 162)),
        "attn.bias": np.ones(162),
        "v_pj.bias": np.ones(6),
        "proj.kernel": np.ones((6, 6)),
    }
    with pytest.raises(WeightsError) as caught:
        resolve(source, TABLE)
    error = caught.value
    found = {problem.kind: error.names(problem.kind) for problem in error.problems}
    assert found == {
        "duplicate": ["v_pj.bias"],
        "misshapen": ["attn.weight"],
        "missing": ["v.weight", "proj.bias"],
        "mixed naming": ["proj.kernel"],
        "non-numeric": ["v.bias"],
        "unexpected": ["v.wieght"],
    }
    message = str(error)
    assert "7 problems with its 6 tensors" in message
    assert "missing (2):" in message
    assert "v.weight (6, 6); the most similar found is v.wieght" in message
    assert "v.wieght; the most similar known is v.weight" in message


def test_error_survives_pickling() -> None:
    with pytest.raises(WeightsError) as caught:
        resolve(change(v__weight=None), TABLE)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.problems == caught.value.problems


def test_long_error_shows_the_first_problems_and_counts_the_rest() -> None:
    with pytest.raises(WeightsError, match=r"unexpected \(500\):(?s:.*)and 480 more") as caught:
        resolve(WEIGHTS | {f"blocks.{place}.weight": np.ones(1) for place in range(500)}, TABLE)
    assert len(caught.value.problems) == 500
    assert len(str(caught.value).splitlines()) == 23


def test_both_twins_raise_the_same_message() -> None:
    messages = []
    for package, make in TWINS.values():
        with pytest.raises(WeightsError) as caught:
            package.load_weights(make(), change(v__weight=None, proj__bias=np.ones(5)))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
