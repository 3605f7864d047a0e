"""What vLLM is told about this machine: its share of a GPU, its cores, and what it cannot run."""

from __future__ import annotations

import math
import os
from importlib import metadata

import pytest
import torch

from ercsvd_deploy.exporters.vllm.engines import machine as serving_machine
from ercsvd_deploy.exporters.vllm.engines.machine import (
    GIB,
    LARGEST_SHARE,
    WITHOUT_TORCHVISION,
    NotServableHereError,
    ServingMachine,
    find_machine,
    memory_share,
)

BIND = "VLLM_CPU_OMP_THREADS_BIND"


def is_accepted(share: float, free: int, total: int) -> bool:
    """What vLLM itself asks when it starts: its share of the whole is no more than what is free."""
    return math.ceil(total * share) <= free


@pytest.mark.parametrize("total", [8 * GIB, 24 * GIB, 80 * GIB, 141 * GIB - 12345])
@pytest.mark.parametrize("free_part", [0.3, 0.5, 0.77, 0.95, 1.0])
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_vllm_accepts_the_share(total: int, free_part: float, num_devices: int) -> None:
    free = int(free_part * total)
    occupied_by_worker = GIB + (GIB if num_devices > 1 else 0)
    try:
        share = memory_share(free, total, weight_bytes=GIB // 8, num_devices=num_devices)
    except NotServableHereError:
        assert free - occupied_by_worker < GIB  # only where next to nothing is left
        return
    assert is_accepted(share, free - occupied_by_worker, total)
    # and it is not timid: a percent more would be refused, unless it is vLLM's own default
    assert share == LARGEST_SHARE or not is_accepted(share + 0.01, free - occupied_by_worker, total)


def test_a_free_gpu_is_used_as_vllm_would() -> None:
    assert memory_share(80 * GIB, 80 * GIB, weight_bytes=16 * GIB) == LARGEST_SHARE


@pytest.mark.parametrize(("free", "weights"), [(10, 16), (0, 1), (1, 0), (17, 16)])
def test_weights_that_do_not_fit_are_an_error_that_says_so(free: int, weights: int) -> None:
    with pytest.raises(NotServableHereError) as refusal:
        memory_share(free * GIB, 80 * GIB, weight_bytes=weights * GIB)
    assert f"{free}.0 of 80.0 GiB free" in str(refusal.value)
    assert f"at least {weights + 1.25:.1f}" in str(refusal.value)


def test_the_fullest_gpu_decides() -> None:
    machine = ServingMachine(4, tuple(range(8)))
    free = {0: 70, 1: 40, 2: 79, 3: 10}
    arguments = machine.engine_arguments(2, 8 * GIB, lambda index: (free[index] * GIB, 80 * GIB))
    assert arguments == {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "gpu_memory_utilization": 0.475,  # (40 - 2) / 80; GPU 3 is not asked
    }


def test_every_gpu_holds_its_part_of_the_weights() -> None:
    machine = ServingMachine(2, (0, 1))

    def half_free(_index: int) -> tuple[int, int]:
        return 12 * GIB, 24 * GIB

    with pytest.raises(NotServableHereError):
        machine.engine_arguments(1, 16 * GIB, half_free)
    assert machine.engine_arguments(2, 16 * GIB, half_free)["gpu_memory_utilization"] == 0.416


@pytest.mark.parametrize(
    ("free", "total", "expected"),
    [
        (79, 80, {"gpu_memory_utilization": 0.138, "kv_cache_memory_bytes": 2 * GIB}),  # (8 + 2 + 1) / 80
        (20, 80, {"gpu_memory_utilization": 0.138, "kv_cache_memory_bytes": 2 * GIB}),
        (11, 80, {"gpu_memory_utilization": 0.125}),  # all that is left: a smaller cache
    ],
)
def test_an_engine_with_a_cache_of_its_own_takes_no_more_than_it_needs(
    free: int, total: int, expected: dict[str, float]
) -> None:
    machine = ServingMachine(1, (0,))
    arguments = machine.engine_arguments(
        1, 8 * GIB, lambda _index: (free * GIB, total * GIB), cache_bytes=2 * GIB
    )
    assert arguments == {"tensor_parallel_size": 1, **expected}
    assert is_accepted(arguments["gpu_memory_utilization"], (free - 1) * GIB, total * GIB)
    on_cpus = ServingMachine(0, (0,)).engine_arguments(1, 8 * GIB, cache_bytes=2 * GIB)
    assert on_cpus == {"tensor_parallel_size": 1}


def test_a_cpu_has_no_share() -> None:
    assert ServingMachine(0, (0, 1)).engine_arguments(1, 10**12) == {"tensor_parallel_size": 1}


def test_sizes_that_cannot_run_are_told_with_what_there_is() -> None:
    cpu, gpus = ServingMachine(0, (0, 1)), ServingMachine(4, tuple(range(64)))
    assert [cpu.reason_against(size) for size in (1, 2)] == [None, None]
    assert cpu.reason_against(4) == "it takes 4 cores, and this machine has 2"
    assert [gpus.reason_against(size) for size in (1, 2, 4)] == [None, None, None]
    assert gpus.reason_against(8) == "it takes 8 GPUs, and this machine has 4"


@pytest.mark.parametrize(
    ("cores", "size", "bound"),
    [
        ((0, 1), 1, "0,1"),
        ((0, 1), 2, "0|1"),
        ((3, 5, 8, 9, 10), 2, "3,5|8,9"),
        (tuple(range(8)), 4, "0,1|2,3|4,5|6,7"),
    ],
)
def test_every_worker_gets_cores_of_its_own(cores: tuple[int, ...], size: int, bound: str) -> None:
    assert ServingMachine(0, cores).environment(size, {})[BIND] == bound


@pytest.mark.parametrize(
    ("size", "given", "kept"),
    [
        (1, "1", True),
        (2, "0|1", True),
        (2, "0", False),
        (1, "auto", True),
        (2, "auto", False),
        (2, "nobind", True),
    ],
)
def test_a_binding_that_the_user_chose_stays_where_it_fits(size: int, given: str, kept: bool) -> None:
    found = ServingMachine(0, (4, 5)).environment(size, {BIND: given, "VLLM_CPU_KVCACHE_SPACE": "7"})
    assert (found[BIND] == given) == kept
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_gpus_need_no_cores() -> None:
    assert BIND not in ServingMachine(1, (0, 1)).environment(1, {})


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_stand_in_for_torchvision_only_where_there_is_none(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_machine, "find_spec", lambda _name: object() if is_installed else None)
    found = ServingMachine(0, (0,)).environment(1, {"PYTHONPATH": "mine"})
    expected = "mine" if is_installed else f"{WITHOUT_TORCHVISION}{os.pathsep}mine"
    assert found["PYTHONPATH"] == expected
    assert (WITHOUT_TORCHVISION / "sitecustomize.py").is_file()


@pytest.mark.parametrize(
    ("versions", "target", "num_gpus"),
    [
        ({"vllm": "0.32.0"}, None, 3),
        ({"vllm": "0.32.0+cu129"}, None, 3),
        ({"vllm": "0.32.0+cpu"}, None, 0),
        ({"vllm-cpu": "0.32.0"}, None, 0),
        ({"vllm": "0.32.0"}, "cpu", 0),
    ],
)
def test_the_cpu_build_leaves_gpus_alone(
    versions: dict[str, str], target: str | None, num_gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    if target is not None:
        monkeypatch.setenv("VLLM_TARGET_DEVICE", target)
    machine = find_machine()
    assert machine.num_gpus == num_gpus
    assert set(machine.cores) == os.sched_getaffinity(0)
