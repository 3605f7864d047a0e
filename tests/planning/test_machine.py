"""The machine that `--machine` describes: sizes by their definition, and refusals that name the remedy."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from ercsvd_deploy.pipelines.planning import machine
from ercsvd_deploy.pipelines.planning.machine import (
    Machine,
    MachineError,
    inspect_machine,
    measure_flops,
    parse_machine,
    planned_device,
)


@pytest.mark.parametrize(
    ("text", "memory", "gpu", "disk"),
    [
        ("gpu=80GiB,memory=512GiB,disk=1TiB", 512 * 2**30, 80 * 2**30, 2**40),
        ("disk=1TB, memory = 1.5GB", 1_500_000_000, None, 10**12),
        ("gpu=none", None, 0, None),
        ("memory=100MiB", 100 * 2**20, None, None),
    ],
)
def test_sizes_are_bytes_and_missing_keys_unknown(
    text: str, memory: int | None, gpu: int | None, disk: int | None
) -> None:
    assert parse_machine(text) == Machine(memory, gpu, disk, is_this_one=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write it like gpu=80GiB,memory=512GiB,disk=1TiB"),
        ("gpu", "'gpu' is none of gpu, memory, disk and flops with a size"),
        ("gpus=80GiB", "did you mean gpu=SIZE?"),
        ("memroy=1GiB", "did you mean memory=SIZE?"),
        ("gpu=80", "gpu is '80'; it must be a number and KB"),
        ("gpu=80GiB,", "'' is none of"),
        ("gpu=1GiB,gpu=2GiB", "gpu is given twice"),
        ("memory=none", "memory is 'none'"),
        ("memory=0GiB", "memory is '0GiB'"),
        ("memory=-1GiB", "memory is '-1GiB'"),
        ("disk=1EiB", "disk is '1EiB'"),
        ("disk=infGiB", "disk is 'infGiB'"),
        ("flops=300", "flops is '300'; it must be a number and M, G, T or P"),
        ("flops=0T", "flops is '0T'"),
        ("flops=1T,flops=2T", "flops is given twice"),
        ("gpu=None", "such as gpu=80GiB, or none"),
    ],
)
def test_what_describes_no_machine(text: str, said: str) -> None:
    with pytest.raises(MachineError) as caught:
        parse_machine(text)
    assert said in str(caught.value)
    assert str(caught.value).startswith("--machine: ")


def test_a_peak_is_in_powers_of_a_thousand() -> None:
    assert parse_machine("flops=312.5T") == Machine(None, None, None, flops=312.5e12, is_this_one=False)
    assert parse_machine("gpu=80GiB, flops=1P").flops == 1e15


def test_a_peak_is_that_of_the_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small products are slowed by their start; nothing is learnt from larger ones once one takes long enough.
    rates = {512: [2e9, 5e9], 1024: [3e9, 9e9], 2048: [11e9, 10e9]}
    times = {side: itertools.cycle([2 * side**3 / rate for rate in each]) for side, each in rates.items()}
    monkeypatch.setattr(machine, "_seconds_of_product", lambda matrix, _product: next(times[len(matrix)]))
    monkeypatch.setattr(machine, "_LONG_ENOUGH_S", 1.0)
    assert measure_flops(torch.device("cpu")) == pytest.approx(11e9)


def test_a_peak_is_at_least_that_of_one_product() -> None:
    matrix = torch.ones(512, 512)
    start = time.perf_counter()
    matrix @ matrix
    assert 2 * 512**3 / (time.perf_counter() - start) < 10 * measure_flops(torch.device("cpu"))


def test_device_follows_from_the_machine() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert planned_device(parse_machine("gpu=80GiB"), None) == cuda
    assert planned_device(parse_machine("gpu=80GiB"), cpu) == cpu
    assert planned_device(parse_machine("gpu=none"), None) == cpu
    assert planned_device(parse_machine("memory=1GiB"), None) is None
    assert planned_device(parse_machine("memory=1GiB"), cuda) == cuda
    with pytest.raises(MachineError, match="gpu=none; change one of the two"):
        planned_device(parse_machine("gpu=none"), cuda)


def test_this_machine_is_this_one() -> None:
    here = inspect_machine(torch.device("cpu"), None)
    assert here.is_this_one
    assert here.name == "this machine"
    assert parse_machine("gpu=none").name == "the machine asked about"


def test_what_this_process_has_cached_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"mem_get_info": (10, 80), "memory_reserved": 7, "memory_allocated": 4}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, answer in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, answer=answer: answer)
    assert inspect_machine(torch.device("cuda"), None).gpu_bytes == 10 + 3
