"""Pieces of work side by side: in order, at the same time, and the same bytes on every number of cores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ercsvd_deploy.data.samples import Sample, text_samples
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.linalg.side_by_side import is_small, map_side_by_side, num_at_once
from ercsvd_deploy.models.description.meta import load_config
from ercsvd_deploy.models.streaming.ends import MAX_TOKENS_PER_BATCH, passes_side_by_side
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.models.streaming.statistics import InputStatistics
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe
from tests.conftest import ModelDirectory
from tests.recipe_runs import RecipeWriter
from tests.state.interrupted_runs import STAGES, hashes

CPU = torch.device("cpu")


@pytest.fixture
def cores() -> Iterator[Callable[[int], None]]:
    """Let torch, which has one thread in these tests, use more for a while."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items(cores: Callable[[int], None]) -> None:
    cores(3)

    def later_ones_first(item: int) -> int:
        time.sleep(0.02 * (5 - item))
        return item**2

    assert list(map_side_by_side(later_ones_first, range(6), small=True)) == [0, 1, 4, 9, 16, 25]
    assert list(map_side_by_side(later_ones_first, [], small=True)) == []


def test_as_many_items_as_there_are_cores_are_worked_on_at_once(cores: Callable[[int], None]) -> None:
    cores(3)
    meeting = threading.Barrier(3, timeout=10)  # breaks unless three wait at the same time

    def meet(_item: int) -> int:
        meeting.wait()
        return threading.get_ident()

    assert len(set(map_side_by_side(meet, range(6), small=True))) == 3


@pytest.mark.parametrize(("small", "count"), [(False, 3), (True, 1)], ids=["large", "one core"])
def test_otherwise_the_calling_thread_works_on_one_after_the_other(
    small: bool, count: int, cores: Callable[[int], None]
) -> None:
    cores(count)
    used = list(
        map_side_by_side(lambda _: (threading.get_ident(), torch.get_num_threads()), range(4), small=small)
    )
    assert used == [(threading.get_ident(), count)] * 4


def test_each_item_has_one_core_and_afterwards_all_is_as_before(cores: Callable[[int], None]) -> None:
    cores(3)
    assert set(map_side_by_side(lambda _: torch.get_num_threads(), range(6), small=True)) == {1}
    assert torch.get_num_threads() == 3
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [3]


def test_every_cpu_is_used_unless_fewer_threads_were_asked_for(
    cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: {0, 1})  # one core, two CPUs
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("ercsvd_deploy.linalg.side_by_side._THREADS_AT_START", 1)
    assert num_at_once() == 2
    monkeypatch.setattr("ercsvd_deploy.linalg.side_by_side._THREADS_AT_START", 2)  # and then set to 1
    assert num_at_once() == 1
    monkeypatch.setattr("ercsvd_deploy.linalg.side_by_side._THREADS_AT_START", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert num_at_once() == 1


@pytest.mark.parametrize("recording", [True, False])
def test_gradients_are_recorded_where_the_caller_records_them(
    recording: bool, cores: Callable[[int], None]
) -> None:
    cores(2)
    with torch.set_grad_enabled(recording):
        assert set(map_side_by_side(lambda _: torch.is_grad_enabled(), range(3), small=True)) == {recording}


def test_the_first_failure_in_order_is_raised_and_cores_are_given_back(cores: Callable[[int], None]) -> None:
    cores(2)

    def fail(item: int) -> int:
        if item in (2, 3):
            raise ValueError(f"item {item}")
        return item

    results = map_side_by_side(fail, range(5), small=True)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)
    assert torch.get_num_threads() == 2


def test_only_a_few_items_are_taken_ahead_of_the_results(cores: Callable[[int], None]) -> None:
    cores(2)
    taken = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    results = map_side_by_side(lambda item: item, items(), small=True)
    for expected in range(5):
        assert next(results) == expected
        assert len(taken) <= expected + 4  # its own, and one more than there are cores
    results.close()  # type: ignore[attr-defined]


def test_results_are_the_same_bytes_on_every_number_of_cores(cores: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(300, 200 + 10 * item, generator=generator).double() for item in range(5)]

    def spectrum(matrix: torch.Tensor) -> bytes:
        values, vectors = torch.linalg.eigh(matrix @ matrix.T)
        return bytes(values.numpy().tobytes() + (vectors.T @ matrix).numpy().tobytes())

    cores(1)
    expected = [spectrum(matrix) for matrix in matrices]
    for count in (1, 2, 4):
        cores(count)
        assert list(map_side_by_side(spectrum, matrices, small=True)) == expected


def test_small_is_a_matter_of_the_longest_side_and_of_the_device() -> None:
    assert is_small([64, 1024], CPU)
    assert not is_small([64, 1025], CPU)
    assert not is_small([64, 64], torch.device("cuda"))


@pytest.fixture
def model(tiny_model: ModelDirectory) -> LayerwiseModel:
    directory = tiny_model("llama")
    return LayerwiseModel(load_config(str(directory)), open_directory(directory), CPU, torch.float32)


def observed(
    model: LayerwiseModel, samples: list[Sample]
) -> tuple[list[torch.Tensor], dict[str, InputStatistics]]:
    batches = model.batches(samples)
    assert len(batches) > 2
    hidden = model.embed(batches)
    statistics = model.input_statistics(model.architecture.layers[0])
    weights = [batch.token_weights for batch in batches]
    model.advance(0, batches, hidden, observe=statistics, token_weights=weights)
    return hidden, statistics


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_batches_side_by_side_give_what_one_after_the_other_gives(
    weighted: bool, model: LayerwiseModel, cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    windows = torch.randint(3, 250, (120, 64), generator=generator)
    samples = text_samples(windows)
    if weighted:
        samples = [Sample(window, token_weights=torch.rand(64, generator=generator)) for window in windows]
    assert passes_side_by_side(model.architecture, CPU)
    cores(1)
    alone, alone_seen = observed(model, samples)
    cores(3)
    together, together_seen = observed(model, samples)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    for name, seen in alone_seen.items():
        assert torch.equal(seen.gram, together_seen[name].gram)
        assert torch.equal(seen.absolute_sum, together_seen[name].absolute_sum)
        assert seen.num_tokens == together_seen[name].num_tokens
    # As a large model is passed through: larger batches, one after the other, observed as they come.
    monkeypatch.setattr("ercsvd_deploy.linalg.side_by_side._LONGEST_SIDE", 0)
    monkeypatch.setattr(
        "ercsvd_deploy.models.streaming.ends.MAX_TOKENS_PER_BATCH", MAX_TOKENS_PER_BATCH // 4 + 1
    )
    assert not passes_side_by_side(model.architecture, CPU)
    large, large_seen = observed(model, samples)
    torch.testing.assert_close(torch.cat(large), torch.cat(together), rtol=1e-4, atol=1e-5)
    for name, seen in large_seen.items():
        torch.testing.assert_close(seen.gram, together_seen[name].gram, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(seen.mean_absolute, together_seen[name].mean_absolute)
        assert seen.num_tokens == pytest.approx(together_seen[name].num_tokens)


@pytest.mark.slow
def test_an_export_is_the_same_bytes_on_every_number_of_cores(
    write_recipe: RecipeWriter,
    tmp_path: Path,
    cores: Callable[[int], None],
) -> None:
    recipe = write_recipe(STAGES[0])
    found = []
    for count in (1, 2, 3):
        cores(count)
        run_recipe(load_recipe(recipe, (), tmp_path / f"on-{count}"))
        found.append(hashes(tmp_path / f"on-{count}"))
    assert "model.safetensors" in found[0]
    assert found[0] == found[1] == found[2]
