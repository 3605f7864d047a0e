"""A finished output is not made again, what users put into it stays, and what is finished is used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE
from ercsvd_deploy.pipelines.reporting.report.files import REPORT_FILES
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from tests.recipe_runs import TEXT, RecipeWriter, factorize, invoke
from tests.state.interrupted_runs import hashes

pytestmark = pytest.mark.slow  # whole runs

STAGES = (factorize(rank_multiple="auto"), {"quantize": {"bits": 4, "group_size": 32}})
ALL = {"judge_original", "factorize", "quantize", "judge"}
GATE = {"gates": {"perplexity_increase": 100.0, "built_in_text": False}}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The pieces that are computed, as (stage, piece)."""
    pieces: list[tuple[str, str]] = []
    finish = CacheFolder.write

    def counted(self: CacheFolder, piece: str, *args: Any) -> None:
        pieces.append((self._directory.name.partition("-")[0], piece))
        finish(self, piece, *args)

    monkeypatch.setattr(CacheFolder, "write", counted)
    return pieces


def stages_of(computed: list[tuple[str, str]]) -> set[str]:
    stages = {stage for stage, _ in computed}
    computed.clear()
    return stages


def run(recipe: Path, *options: object, code: int = 0) -> str:
    found, output, error = invoke("run", recipe, *options)
    assert found == code, error
    return output + error


def test_nothing_is_done_twice(
    write_recipe: RecipeWriter, tmp_path: Path, computed: list[tuple[str, str]]
) -> None:
    recipe = write_recipe(*STAGES)
    run(recipe)
    assert stages_of(computed) == ALL
    before = hashes(tmp_path / "out")
    report = (tmp_path / "out" / REPORT_FILE).read_bytes()
    (tmp_path / "out" / "notes.txt").write_text("kept")
    assert "out is finished and unchanged: nothing to do" in run(recipe)
    assert json.loads(invoke("run", recipe, "--json")[1])["nothing_to_do"] is True
    assert stages_of(computed) == set()
    assert (tmp_path / "out" / REPORT_FILE).read_bytes() == report
    assert hashes(tmp_path / "out").items() - before.items() == {
        item for item in hashes(tmp_path / "out").items() if item[0] == "notes.txt"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


CHANGES: dict[str, tuple[str, set[str]]] = {
    "another ratio": ("stages.0.factorize.compression_ratio=0.4", ALL),
    "another text": ("evaluation.max_sequences=3", ALL),
    "other shards": ("export.max_shard_size=100KB", ALL),
    "forced": ("", ALL),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recipe_replaces_the_output_and_keeps_what_users_put_in(
    change: str, write_recipe: RecipeWriter, tmp_path: Path, computed: list[tuple[str, str]]
) -> None:
    recipe = write_recipe(*STAGES)
    run(recipe)
    computed.clear()
    out = tmp_path / "out"
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (out / "notes.txt").write_text("kept")
    override, stages = CHANGES[change]
    run(recipe, *(["--set", override] if override else ["--force"]))
    assert stages_of(computed) == stages
    assert (out / ".git" / "HEAD").read_text() == "ref: refs/heads/main"
    assert (out / "notes.txt").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]
    if change == "other shards":
        assert not (out / "model.safetensors").exists()
        assert (out / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("name", ["README.md", "chat_template.jinja", "model.safetensors"])
def test_a_file_that_somebody_has_changed_is_not_replaced(
    name: str, write_recipe: RecipeWriter, tmp_path: Path, computed: list[tuple[str, str]]
) -> None:
    recipe = write_recipe(*STAGES)
    run(recipe)
    file = tmp_path / "out" / name
    contents = bytearray(file.read_bytes())
    contents[-3] ^= 1
    file.write_bytes(contents)
    computed.clear()
    said = run(recipe, "--set", "stages.0.factorize.compression_ratio=0.4", code=1)
    assert "changed since the export was written" in said
    assert "--force" in said
    assert stages_of(computed) == set()  # said before the hours of work
    assert file.read_bytes() == contents
    run(recipe, "--set", "stages.0.factorize.compression_ratio=0.4", "--force")
    assert file.read_bytes() != contents


def test_another_gate_is_judged_on_what_is_there(
    write_recipe: RecipeWriter, tmp_path: Path, computed: list[tuple[str, str]]
) -> None:
    run(write_recipe(*STAGES))
    before = hashes(tmp_path / "out")
    computed.clear()
    said = run(write_recipe(*STAGES, **GATE))
    assert "nothing to do" in said
    assert "Increase of perplexity" in said
    missed = {"gates": {"logprob_kl": 0.0, "built_in_text": False}}
    assert "MISSED" in run(write_recipe(*STAGES, **missed), code=3)
    assert stages_of(computed) == set()
    assert hashes(tmp_path / "out") == before
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert [gate["gate"] for gate in report["gates"]] == ["logprob_kl"]
    assert invoke("check", tmp_path / "out")[0] == 3
    assert invoke("verify", tmp_path / "out")[0] == 0
    run(write_recipe(*STAGES, **missed), "--set", "stages.0.factorize.compression_ratio=0.4", code=3)


def test_kept_work_is_used_for_another_text(
    write_recipe: RecipeWriter, tmp_path: Path, computed: list[tuple[str, str]]
) -> None:
    recipe = write_recipe(*STAGES)
    run(recipe, "--keep-work")
    before = hashes(tmp_path / "out")
    computed.clear()
    assert json.loads(invoke("status", tmp_path / "out", "--json")[1])["stages"]
    other = {"evaluation": {"perplexity": {"prose": str(TEXT / "out_of_domain.txt")}, "max_sequences": 4}}
    run(write_recipe(*STAGES, **other), "--keep-work")
    assert stages_of(computed) == {"judge_original", "judge"}
    assert hashes(tmp_path / "out") == before
    assert invoke("clean", tmp_path / "out")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_a_cache_is_shared_by_several_outputs(
    write_recipe: RecipeWriter, tmp_path: Path, computed: list[tuple[str, str]]
) -> None:
    recipe, cache = write_recipe(*STAGES), tmp_path / "cache"
    run(recipe, "--cache", cache)
    assert stages_of(computed) == ALL
    run(recipe, "--cache", cache, "--output", tmp_path / "other", "--set", "quantize.bits=8")
    assert stages_of(computed) == {"quantize", "judge"}
    run(recipe, "--cache", cache, "--output", tmp_path / "third")
    assert stages_of(computed) == set()
    assert hashes(tmp_path / "third") == hashes(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= REPORT_FILES - {"ercsvd_report.html"}
    status = json.loads(invoke("status", cache, "--json")[1])
    assert {stage["name"].partition("-")[0] for stage in status["stages"]} == ALL
    assert invoke("clean", cache)[0] == 0
    assert [path.name for path in cache.iterdir()] == ["model-files.json"]
    run(recipe, "--cache", cache, "--output", tmp_path / "fourth")
    assert stages_of(computed) == ALL


@pytest.mark.parametrize("ratio", [0.01, 1.0])
def test_gates_are_judged_where_all_stages_are_reused(
    ratio: float, write_recipe: RecipeWriter, tmp_path: Path, computed: list[tuple[str, str]]
) -> None:
    gates = {"max_size_ratio": ratio, "perplexity_increase": 100.0, "built_in_text": False}
    recipe, cache = write_recipe(*STAGES, gates=gates), tmp_path / "cache"
    code = 0 if ratio == 1 else 3
    run(recipe, "--cache", cache, code=code)
    computed.clear()
    run(recipe, "--cache", cache, "--output", tmp_path / "other", code=code)
    assert stages_of(computed) == set()
    verdicts = [json.loads((tmp_path / name / REPORT_FILE).read_text())["gates"] for name in ("out", "other")]
    assert verdicts[0] == verdicts[1]
    assert {gate["gate"] for gate in verdicts[1]} == {"max_size_ratio", "perplexity_increase"}
    assert all(gate["passed"] for gate in verdicts[1]) == (code == 0)


def test_an_interrupted_run_goes_on_from_a_cache(
    write_recipe: RecipeWriter,
    tmp_path: Path,
    computed: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    recipe, cache = write_recipe(*STAGES), tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr("ercsvd_deploy.pipelines.stages.export.write_export", interrupt)
        said = run(recipe, "--cache", cache, code=130)
    assert f"{cache} keeps what is finished: the same command goes on from there" in said
    computed.clear()
    run(recipe, "--cache", cache)
    assert stages_of(computed) == set()
