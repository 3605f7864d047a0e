"""Whole runs on small random models: what is written, what is said, and what is never left behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE
from ercsvd_deploy.pipelines.reporting.report.json_values import finite
from ercsvd_deploy.pipelines.stages.factorize.outcome import FactorizeOutcome
from ercsvd_deploy.pipelines.state.lock import resumable_directory
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import TEXT, RecipeWriter, factorize, invoke


def test_export_is_a_model_that_transformers_loads(
    write_recipe: RecipeWriter, tmp_path: Path, llama: Path
) -> None:
    report, directory = run_recipe(load_recipe(write_recipe()))
    assert directory == tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokens = torch.randint(3, 250, (2, 16))
    original = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        difference = (model(tokens).logits - original(tokens).logits).abs().max()
    assert 0 < float(difference) < 100
    assert report.compressed.parameters < report.original.parameters
    stored = sum(t.numel() * t.element_size() for t in load_file(directory / "model.safetensors").values())
    assert stored == report.compressed.num_bytes
    assert json.loads((directory / REPORT_FILE).read_text())["compressed"]["num_bytes"] == stored
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (directory / name).read_bytes() == (llama / name).read_bytes()


def test_search_tries_every_admissible_k_and_takes_the_best(write_recipe: RecipeWriter) -> None:
    report, _ = run_recipe(load_recipe(write_recipe(factorize(num_compressed_layers="auto"))))
    outcome = report.results["factorize"]
    assert isinstance(outcome, FactorizeOutcome)
    errors = {point.num_compressed_layers: point.final_layer_error for point in outcome.search}
    assert sorted(errors) == [2, 3, 4]
    assert outcome.plan.num_compressed_layers == min(errors, key=lambda k: errors[k] or 0.0)


@pytest.mark.parametrize("method", ["svd", "asvd", "svd_llm", "erc_svd"])
def test_searched_error_is_that_of_the_exported_model(
    method: str, write_recipe: RecipeWriter, llama: Path
) -> None:
    """The search's figure for the chosen k must be reproducible from the export, by transformers alone."""
    recipe = load_recipe(write_recipe(factorize(method=method, num_compressed_layers=3)))
    report, directory = run_recipe(recipe)
    from ercsvd_deploy.data.texts import load_tokenizer
    from ercsvd_deploy.pipelines.inputs.texts import calibration_windows

    assert recipe.calibration is not None
    assert report.results["factorize"] is not None
    tokens = calibration_windows(recipe.calibration, load_tokenizer(str(llama)), 256)[0][:4]

    def last_layer_output(path: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        seen: list[torch.Tensor] = []
        model.model.layers[-1].register_forward_hook(lambda _m, _i, output: seen.append(output))
        with torch.no_grad():
            model(tokens)
        return seen[0].double()

    original, compressed = last_layer_output(llama), last_layer_output(directory)
    expected = float((compressed - original).norm() / original.norm())
    assert report.results["factorize"].search[0].final_layer_error == pytest.approx(expected, rel=1e-3)


def test_layers_before_the_last_k_are_untouched(write_recipe: RecipeWriter, llama: Path) -> None:
    _, directory = run_recipe(load_recipe(write_recipe(factorize(num_compressed_layers=2))))
    before, after = load_file(llama / "model.safetensors"), load_file(directory / "model.safetensors")
    config = CheckpointConfig.read(json.loads((directory / "config.json").read_text())["quantization_config"])
    assert {name.split(".")[2] for name in config.modules} == {"2", "3"}
    untouched = [name for name in before if name.rpartition(".")[0] not in config.modules]
    assert any(name.startswith("model.layers.1.") for name in untouched)
    for name in untouched:
        assert torch.equal(before[name], after[name]), name


def test_budget_holds_in_the_written_files(write_recipe: RecipeWriter) -> None:
    report, _ = run_recipe(load_recipe(write_recipe(factorize(compression_ratio=0.4))))
    assert report.results["factorize"] is not None
    assert report.compressed.linear_parameters <= report.results["factorize"].plan.parameter_budget
    assert report.compressed.linear_parameters == report.results["factorize"].plan.kept_parameters


@pytest.mark.slow
def test_two_runs_write_the_same_bytes(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe()
    run_recipe(load_recipe(recipe, output=tmp_path / "a"))
    run_recipe(load_recipe(recipe, output=tmp_path / "b"))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_recipe_dtype_is_what_is_written(write_recipe: RecipeWriter, llama: Path) -> None:
    _, directory = run_recipe(load_recipe(write_recipe(model={"path": str(llama), "dtype": "bfloat16"})))
    assert {t.dtype for t in load_file(directory / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_hold_whole_layers(write_recipe: RecipeWriter) -> None:
    recipe = load_recipe(write_recipe(), ["export.max_shard_size=700KB"])
    _, directory = run_recipe(recipe)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for layer in range(4):
        files = {file for name, file in index.items() if name.startswith(f"model.layers.{layer}.")}
        assert len(files) == 1
    AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("moment", "target"),
    [
        ("while factorizing", "ercsvd_deploy.pipelines.state.cache.write_atomically"),
        ("while writing shards", "ercsvd_deploy.format.files.atomic_files.save_file"),
        ("at the very end", "ercsvd_deploy.exporters.vllm.directory.writer.write_json_atomically"),
    ],
)
def test_failure_leaves_nothing_under_the_outputs_name(
    moment: str, target: str, write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device", moment)

    monkeypatch.setattr(target, full_disk)
    code, _, error = invoke("run", write_recipe())
    assert code == 1
    assert "No space left" in error
    assert "Traceback" not in error
    visible = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert visible == ["recipe.yaml"]


def test_failure_keeps_the_earlier_export(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe()
    run_recipe(load_recipe(recipe))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        "ercsvd_deploy.format.files.atomic_files.save_file",
        lambda *_a, **_k: (_ for _ in ()).throw(OSError(28, "full")),
    )
    code, _, _ = invoke("run", recipe, "--force")
    assert code == 1
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_two_runs_on_one_output_exclude_each_other(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    with resumable_directory(tmp_path / "out"):
        code, _, error = invoke("run", write_recipe())
        assert code == 1
        assert "another run is writing" in error
    assert invoke("run", write_recipe())[0] == 0


@pytest.mark.slow
def test_killed_run_leaves_nothing_that_looks_finished(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe()
    command = [sys.executable, "-m", "ercsvd_deploy", "run", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out.work/factorize/*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "out").exists()
    assert invoke("run", recipe)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_output_is_never_an_unrelated_directory(
    write_recipe: RecipeWriter, tmp_path: Path, llama: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for target in (precious, llama, llama / "inside"):
        code, _, error = invoke("run", write_recipe(), "--output", target)
        assert code == 1
        assert str(target) in error
    assert (precious / "thesis.txt").read_text() == "years of work"


@pytest.mark.draws
def test_run_prints_the_table_and_json(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe()
    code, output, _ = invoke("run", recipe)
    assert code == 0
    for expected in ("Size of all tensors", "Perplexity, held_out", "chosen", "vllm serve"):
        assert expected in output
    code, output, _ = invoke("run", recipe, "--json")
    assert code == 0
    assert json.loads(output)["compressed"]["perplexity"]["held_out"] > 1


@pytest.mark.slow
def test_plan_agrees_with_the_run(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(
        factorize(num_compressed_layers=3, rank_multiple="auto"),
        {"quantize": {"bits": 4, "group_size": 32, "overrides": {"mlp.down_proj": {"bits": 8}}}},
    )
    code, output, _ = invoke("plan", recipe, "--json")
    assert code == 0
    planned = json.loads(output)["candidates"][0]
    report, _ = run_recipe(load_recipe(recipe))
    assert planned["num_bytes"] == report.compressed.num_bytes
    assert planned["linear_parameters"] == report.compressed.linear_parameters
    assert planned["bytes_by_part"] == report.compressed.bytes_by_part
    assert not any("the plan foresaw" in warning for warning in report.warnings)
    assert planned["linear_bits_per_weight"] == pytest.approx(report.compressed.linear_bits_per_weight)


def test_bytes_on_a_gpu_shrink_with_tensor_parallelism(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(
        {"quantize": {"bits": 4, "group_size": 32}}, serving={"tensor_parallel_sizes": [1, 2]}
    )
    _, output, _ = invoke("plan", recipe, "--json")
    candidate = json.loads(output)["candidates"][0]
    one, two = candidate["gpu_bytes"]["1"], candidate["gpu_bytes"]["2"]
    guards_and_shapes = 0.01 * candidate["num_bytes"]
    assert one == pytest.approx(candidate["num_bytes"], abs=guards_and_shapes)
    assert one / 2 <= two < 0.6 * one


def test_plan_needs_no_weights(write_recipe: RecipeWriter, tmp_path: Path, llama: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((llama / "config.json").read_bytes())
    code, output, _ = invoke("plan", write_recipe(model={"path": str(bare)}))
    assert code == 0
    assert "Ranks with k" in output


def test_eval_agrees_with_the_report(write_recipe: RecipeWriter) -> None:
    report, directory = run_recipe(load_recipe(write_recipe()))
    text = f"held_out={TEXT / 'in_domain.txt'}"
    code, output, _ = invoke(
        "eval", directory, "--text", text, "--sequence-length", 48, "--max-sequences", 4, "--json"
    )
    assert code == 0
    measured = json.loads(output)["perplexity"]["held_out"]
    assert measured == pytest.approx(report.compressed.perplexity["held_out"], rel=1e-6)


@pytest.mark.parametrize(
    ("override", "code", "expected"),
    [
        ("stages.0.factorize.compresion_ratio=0.4", 2, "did you mean 'compression_ratio'"),
        ("stages.0.factorize.compression_ratio=0.97", 2, "compression_ratio"),
        (
            "stages.0.factorize={method: erc_svd, compression_ratio: 0.93, rank_multiple: 32, "
            "num_search_samples: 4}",
            2,
            "no number of layers can reach",
        ),
        ("stages.0.factorize.num_compressed_layers=1", 2, "admissible"),
        ("calibration.num_samples=100000", 1, "lower num_samples"),
        ("calibration.dataset.text=nowhere.txt", 2, "nowhere.txt"),
        ("model.path=./nowhere", 2, "nowhere"),
        ("evaluation.sequence_length=1000000", 2, "evaluation.sequence_length is 1000000"),
        ("calibration.sequence_length=1", 2, "calibration.sequence_length"),
    ],
)
def test_bad_input_is_one_message(
    override: str, code: int, expected: str, write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    found, output, error = invoke("run", write_recipe(), "--set", override)
    assert found == code
    assert expected in error
    assert "Traceback" not in error + output
    assert not (tmp_path / "out").exists()


def test_written_files_can_be_read_by_whoever_may_read_the_config(write_recipe: RecipeWriter) -> None:
    _, directory = run_recipe(load_recipe(write_recipe()))
    modes = {path.stat().st_mode for path in directory.iterdir() if path.suffix in (".json", ".safetensors")}
    assert len(modes) == 1


def test_compressed_source_is_refused(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    run_recipe(load_recipe(write_recipe()))
    for command in ("plan", "run"):
        code, _, error = invoke(command, write_recipe(), "--set", f"model.path={tmp_path / 'out'}")
        assert code == 1
        assert "already compressed" in error


def test_windows_longer_than_the_model_are_refused(write_recipe: RecipeWriter, llama: Path) -> None:
    code, _, error = invoke("run", write_recipe(), "--set", "calibration.sequence_length=512")
    assert code == 2
    assert "the model has 256 positions" in error
    code, _, error = invoke("eval", llama, "--text", TEXT / "in_domain.txt", "--sequence-length", 512)
    assert code == 2
    assert "the model has 256 positions" in error


def test_numbers_that_json_lacks_become_null() -> None:
    assert finite({"a": [1.0, float("inf")], "b": (float("nan"),)}) == {"a": [1.0, None], "b": [None]}


def test_every_table_of_the_plan_has_a_heading_for_each_column(write_recipe: RecipeWriter) -> None:
    _, output, _ = invoke("plan", write_recipe(factorize(), {"quantize": {"group_size": -1}}))
    headings = re.findall(r"┏[^\n]*\n(.*?)\n┡", output, re.DOTALL)
    assert len(headings) >= 5
    for heading in headings:
        lines = [line.strip().strip("┃").split("┃") for line in heading.splitlines()]  # long ones are wrapped
        words = ["".join(cells).strip() for cells in zip(*lines, strict=True)]
        assert all(words[1:])


def test_version() -> None:
    assert invoke("version")[1].startswith("ercsvd-deploy ")


def test_names_with_brackets_are_names(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    """Not the markup of the library that prints tables."""
    output = tmp_path / "[bold]out[/y]"
    code, printed, error = invoke("run", write_recipe(), "--output", output)
    assert code == 0, error
    assert "[bold]out[/y]" in printed.replace("\n", "")
    text = f"[/red]x={TEXT / 'in_domain.txt'}"
    code, printed, error = invoke("eval", output, "--text", text, "--max-sequences", 1)
    assert code == 0, error
    assert "Perplexity, [/red]x" in printed
