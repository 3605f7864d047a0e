"""Speeds are measured, remembered under what they depend on, and turned into times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ercsvd_deploy.pipelines.cli.app import app
from ercsvd_deploy.pipelines.planning import host_speed
from ercsvd_deploy.pipelines.planning.cost_model import Work, eigh_seconds
from ercsvd_deploy.pipelines.planning.host_speed import (
    HostSpeed,
    bench_host,
    cache_path,
    host_key,
    remembered_speed,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SPEED = HostSpeed(
    matmul_flops=1e9,
    single_flops=2e9,
    double_flops=5e8,
    eigh_seconds={10: 1.0, 100: 500.0},
    copy_bytes=1e8,
    small_operation=1e-3,
    disk_write_bytes=1e7,
    disk_read_bytes=2e7,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_speed, "_MATMUL_SIDE", 64)
    monkeypatch.setattr(host_speed, "_DOUBLE_SIDE", 64)
    monkeypatch.setattr(host_speed, "_EIGH_SIDES", (16, 64))
    monkeypatch.setattr(host_speed, "_COPIED_BYTES", 2**20)
    monkeypatch.setattr(host_speed, "_FILE_BYTES", 2**20)


def remember(speeds: Mapping[str, HostSpeed]) -> None:
    cache_path().parent.mkdir(parents=True, exist_ok=True)
    cache_path().write_text(json.dumps({key: asdict(speed) for key, speed in speeds.items()}))


@pytest.mark.usefixtures("small")
def test_measured_speeds_are_remembered(tmp_path: Path) -> None:
    assert remembered_speed(CPU) is None
    speed = bench_host(CPU, tmp_path)
    assert remembered_speed(CPU) == speed
    assert all(value > 0 for value in asdict(speed).values() if isinstance(value, float))
    assert list(speed.eigh_seconds) == [16, 64]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # the measured file is gone


@pytest.mark.usefixtures("small")
def test_other_machines_and_thread_counts_are_kept_apart(tmp_path: Path) -> None:
    remember({"another machine": SPEED})
    bench_host(CPU, tmp_path)
    kept = json.loads(cache_path().read_text())
    assert kept["another machine"] == json.loads(json.dumps(asdict(SPEED)))
    assert set(kept) == {"another machine", host_key(CPU)}
    assert f"{torch.get_num_threads()} threads" in host_key(CPU)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": {"matmul_flops": "fast"}}'])
def test_damaged_cache_counts_as_none(content: str) -> None:
    cache_path().parent.mkdir(parents=True)
    cache_path().write_text(content)
    assert remembered_speed(CPU) is None


@pytest.mark.usefixtures("small")
def test_command_prints_speeds_and_plan_then_tells_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    before = CliRunner().invoke(app, ["plan", "recipes/demo.yaml", "--output", str(tmp_path / "out")])
    assert "ercsvd bench-host" in before.stdout
    benched = CliRunner().invoke(app, ["bench-host", "--directory", str(tmp_path), "--json"])
    assert benched.exit_code == 0, benched.stderr
    assert json.loads(benched.stdout)["host"].startswith(("cpu", "cuda"))
    after = CliRunner().invoke(
        app, ["plan", "recipes/demo.yaml", "--output", str(tmp_path / "out"), "--json"]
    )
    seconds = json.loads(after.stdout)["estimate"]["seconds"]
    assert list(seconds) == ["factorize", "quantize", "evaluate", "export"]
    assert all(value > 0 for value in seconds.values())
    assert json.loads(after.stdout)["estimate"]["problems"] == []


def test_work_adds_up_and_is_divided_by_the_speeds() -> None:
    work = Work(passing=3e9, single=4e9, read=4e7) + Work(passing=1e9, double=5e8, written=1e7, moved=1e8)
    assert work.seconds(SPEED) == pytest.approx(4 + 2 + 1 + 2 + 1 + 1)
    assert (work + Work(eigh=(10, 100))).seconds(SPEED) == pytest.approx(11 + 501)


def test_eigendecompositions_grow_with_the_cube_beyond_the_measured_sizes() -> None:
    assert eigh_seconds(10, SPEED) == pytest.approx(1.0)
    assert eigh_seconds(100, SPEED) == pytest.approx(500.0)
    assert eigh_seconds(200, SPEED) == pytest.approx(4000.0)
    assert eigh_seconds(5, SPEED) == pytest.approx(0.125)
    assert 1.0 < eigh_seconds(30, SPEED) < 500.0


def test_a_faster_machine_is_told_to_be_faster() -> None:
    work = Work(passing=1e9, eigh=(50,), read=1e7)
    assert work.seconds(replace(SPEED, matmul_flops=1e10)) < work.seconds(SPEED)
