"""Training a small VOLO on eight devices, and in two processes, is training it on one: to rounding in float64."""

from typing import Any

import pytest

from parity_tests.support.subprocesses import run_in_processes, run_on_devices

MODULE = "parity_tests.support.sharded_training"
KINDS = {"losses", "gradient", "weights", "statistics"}


def check(errors: dict[str, float]) -> None:
    assert errors.keys() == KINDS
    assert max(errors.values()) <= 1e-12, errors


@pytest.fixture(scope="module")
def quick() -> Any:
    return run_on_devices(MODULE, 8, "fsdp")


@pytest.fixture(scope="module")
def slow() -> Any:
    return run_on_devices(MODULE, 8, "data,tensor,shard_map,ghosts", timeout=1200)


@pytest.mark.long(reason="compiles training steps for eight devices")
def test_training_with_split_weights_on_eight_devices_is_training_on_one(quick: Any) -> None:
    check(quick["fsdp"])


@pytest.mark.slow  # each compiles a training step for eight devices
@pytest.mark.parametrize("way", ["data", "tensor", "shard_map", "ghosts"])
def test_so_is_training_by_other_rules_and_with_statistics_of_all_or_of_parts(slow: Any, way: str) -> None:
    check(slow[way])


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_in_processes(MODULE, 2, 8, "fsdp", tmp_path_factory.mktemp("shared"))


@pytest.mark.slow  # two processes compile a training step each
def test_training_in_two_processes_is_training_in_one(processes: Any) -> None:
    for found in processes:
        check(found["fsdp"])


@pytest.mark.slow  # likewise
def test_two_processes_save_gathered_weights_and_load_them_where_they_were(processes: Any) -> None:
    for found in processes:
        assert found["exported"]
        assert found["kept"]
        assert found["step"] == found["counted"] == 7


@pytest.mark.slow  # likewise
def test_a_file_that_cannot_be_written_is_an_error_in_every_process(processes: Any) -> None:
    first, second = (found["refused"] for found in processes)
    assert "missing" in first
    assert "the first process could not write" in second
