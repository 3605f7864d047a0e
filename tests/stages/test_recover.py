"""The recover stage: factors nearer to the original's outputs, nothing else touched, resumed, served."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.samples import Batch, Sample, make_batches, text_samples
from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.format.integer_words import dequantize
from ercsvd_deploy.models.compressed.modules import LowRankLinear, PivotedLinear
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.inputs.model import open_model, stream
from ercsvd_deploy.pipelines.inputs.texts import calibration_windows
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE, Report
from ercsvd_deploy.pipelines.stages.recover.results import RecoverOutcome
from ercsvd_deploy.pipelines.stages.recover.training import _with_replaced_tokens, recover_decoder
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.recipe.load import ModelSource, Recover, load_recipe
from tests.recipe_runs import TEXT, RecipeWriter, factorize, invoke
from tests.state.interrupted_runs import half_run, hashes, whole_run

pytestmark = pytest.mark.slow  # whole runs

TINY_LLAMA = str(TEXT.parent / "tiny-llama")
# Plain truncation leaves much to learn; the first of four layers stays whole.
HARD = factorize(method="svd", compression_ratio=0.4, num_compressed_layers=3)
CALIBRATION = {"dataset": {"text": str(TEXT / "calibration.txt")}, "num_samples": 24, "sequence_length": 32}


def recover(**settings: Any) -> dict[str, Any]:
    return {"recover": {"steps": 12, "batch_size": 4} | settings}


def run(recipe: Path) -> tuple[Report, Path]:
    return run_recipe(load_recipe(recipe))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(directory / "model.safetensors")
    return tensors


def relative_error(approximation: torch.Tensor, exact: torch.Tensor) -> float:
    return float((approximation.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("layout", ["low_rank", "pivoted"])
def test_factors_alone_change_and_outputs_come_nearer(
    layout: str, write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    hard = {"factorize": HARD["factorize"] | {"layout": layout}}
    plain, directory = run(write_recipe(hard, calibration=CALIBRATION))
    before = tensors_of(directory)
    export = {"path": str(tmp_path / "recovered")}
    recovered, directory = run(write_recipe(hard, recover(), calibration=CALIBRATION, export=export))
    after = tensors_of(directory)

    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    factors = {name for name in after if name.rpartition(".")[0].endswith(tuple(PARTS[layout]))}
    assert changed == factors
    assert recovered.results["recover"] is not None
    assert [layer.layer for layer in recovered.results["recover"].layers] == [1, 2, 3]
    for layer in recovered.results["recover"].layers:
        assert layer.is_kept
        assert layer.error_after < layer.error_before
    assert recovered.change.final_layer_error["held_out"] < plain.change.final_layer_error["held_out"]
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    kind = PivotedLinear if layout == "pivoted" else LowRankLinear
    assert any(isinstance(module, kind) for module in loaded.modules())
    assert torch.isfinite(loaded(torch.arange(3, 20)[None]).logits).all()


PARTS = {"low_rank": ("factor_a", "factor_b"), "pivoted": ("pivot_rows", "other_rows")}


@pytest.mark.parametrize(("replaced_tokens", "lookahead"), [(0.0, 0), (0.5, 0), (0.0, 1), (0.0, 3)])
def test_reported_errors_are_those_of_the_models(
    replaced_tokens: float, lookahead: int, write_recipe: RecipeWriter, llama: Path
) -> None:
    """The first layer's error that reaches the end, from both whole models' hidden states."""
    stage = recover(replaced_tokens=replaced_tokens, lookahead=lookahead)
    recipe = load_recipe(write_recipe(HARD, stage, calibration=CALIBRATION))
    report, directory = run_recipe(recipe)
    assert recipe.calibration is not None
    assert report.results["recover"] is not None
    windows = calibration_windows(recipe.calibration, load_tokenizer(str(llama)), 256)[0]
    batches = make_batches(text_samples(windows), 4 * 32)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = batches[order[-1]].tokens
    last: list[torch.Tensor] = []
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    trained = max(1, 3 - lookahead)  # the first layer is not compressed
    for path in (llama, directory):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for index in range(trained + 1, 4):  # layers that are compressed later
            model.model.layers[index] = original.model.layers[index]
        hook = model.model.layers[-1].register_forward_hook(lambda _m, _i, output: last.append(output))
        with torch.no_grad():
            model(tokens)
        hook.remove()
    target, output = last
    expected = ((output - target).square().sum(-1) / target.square().sum(-1)).mean()
    [layer] = [each for each in report.results["recover"].layers if each.layer == trained]
    assert layer.error_after == pytest.approx(float(expected), rel=1e-3)


def test_a_layer_that_gets_worse_keeps_its_factors(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    _, directory = run(write_recipe(HARD, calibration=CALIBRATION))
    before = tensors_of(directory)
    export = {"path": str(tmp_path / "recovered")}
    ruinous = recover(learning_rate=0.9, steps=3)
    report, directory = run(write_recipe(HARD, ruinous, calibration=CALIBRATION, export=export))
    after = tensors_of(directory)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if tensor.numel())
    assert report.results["recover"] is not None
    assert not any(layer.is_kept for layer in report.results["recover"].layers)
    [warning] = [each for each in report.warnings if "recovery" in each]
    assert "layers 1, 2, 3" in warning
    assert "learning_rate" in warning


@pytest.mark.parametrize("pieces", [5, 6, 8])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    pieces: int, write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = {"factorize": HARD["factorize"] | {"rank_multiple": 32}}
    quantize = {"quantize": {"bits": 8, "group_size": 32, "ignore": ["*.layers.0.*"]}}
    recipe = write_recipe(hard, recover(replaced_tokens=0.3), quantize, calibration=CALIBRATION)
    everything, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    half_run(recipe, monkeypatch, pieces)
    computed, _ = whole_run(recipe, monkeypatch)
    assert hashes(tmp_path / "out") == expected
    assert computed == everything - pieces


def test_changed_steps_train_again_and_factorize_no_more(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(HARD, recover(), calibration=CALIBRATION)
    half_run(recipe, monkeypatch, 13)  # of them five for the original, which is judged first
    _, notes = whole_run(recipe, monkeypatch, "stages.1.recover.steps=5")
    assert any(note.startswith("recover: computed again, because recover.steps") for note in notes)
    assert any(note.startswith("factorize: ") and "are used" in note for note in notes)


def test_quantization_keeps_to_the_trained_factors(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    """Eight bits are nearly exact: what is served must be the trained product, not the original weight."""
    hard = {"factorize": HARD["factorize"] | {"rank_multiple": 32}}
    training = recover(learning_rate=0.01)
    _, plain = run(write_recipe(hard, training, calibration=CALIBRATION))
    export = {"path": str(tmp_path / "quantized")}
    quantize = {"quantize": {"bits": 8, "group_size": 32}}
    _, quantized = run(write_recipe(hard, training, quantize, calibration=CALIBRATION, export=export))
    exact, rounded = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (plain, quantized))
    firsts = [name for name in exact if name.endswith("factor_a.weight")]
    assert len(firsts) > 10
    for first in firsts:
        linear = first.removesuffix(".factor_a.weight")
        served = [unpacked(rounded, f"{linear}.{part}") for part in PARTS["low_rank"]]
        product = exact[f"{linear}.factor_b.weight"] @ exact[first]
        assert relative_error(served[1] @ served[0], product) < 0.02


def unpacked(state: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """Return a matrix from its integers of eight bits, in groups of 32."""
    scale = state[f"{prefix}.weight_scale"]
    return dequantize(state[f"{prefix}.weight_packed"], scale, None, bits=8, columns=32 * scale.shape[1])


@pytest.mark.parametrize("stages", [[], [HARD], [HARD, recover()]], ids=len)
def test_scales_alone_change_behind_integers(
    stages: list[dict[str, Any]], write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    """Of dense integers, of integer factors, and of factors that were trained themselves."""
    stages = [
        {"factorize": stage["factorize"] | {"rank_multiple": 32}} if "factorize" in stage else stage
        for stage in stages
    ]
    quantize = {"quantize": {"bits": 4, "group_size": 32, "method": "rtn"}}
    plain, directory = run(write_recipe(*stages, quantize, calibration=CALIBRATION))
    before = tensors_of(directory)
    export = {"path": str(tmp_path / "recovered")}
    recovered, directory = run(
        write_recipe(*stages, quantize, recover(learning_rate=0.01), calibration=CALIBRATION, export=export)
    )
    after = tensors_of(directory)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    scales = {name for name in after if name.endswith("weight_scale")}
    assert changed == scales
    outcome = recovered.results["recover_quantized"]
    assert outcome is not None
    assert len(outcome.layers) == 4
    assert all(layer.is_kept and layer.error_after < layer.error_before for layer in outcome.layers)
    assert recovered.change.final_layer_error["held_out"] < plain.change.final_layer_error["held_out"]
    assert ("recover" not in recovered.results) == (len(stages) < 2)
    for file in ("ercsvd_report.html", "README.md"):
        told = (directory / file).read_text(encoding="utf-8")
        assert ("Factors and scales were" if len(stages) == 2 else "Scales were") in told
    logits = AutoModelForCausalLM.from_pretrained(directory)(torch.arange(3, 20)[None]).logits
    assert torch.isfinite(logits).all()


def models(llama: Path, directory: Path, dtype: torch.dtype) -> tuple[LayerwiseModel, LayerwiseModel]:
    found = []
    for path in (llama, directory):
        model = stream(open_model(ModelSource(path=str(path))), torch.device("cpu"))
        found.append(LayerwiseModel(model.config, model.store, model.device, dtype))
    return found[0], found[1]


def recovered_by_hand(
    llama: Path,
    directory: Path,
    samples: list[Sample],
    work: Path,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> RecoverOutcome:
    from ercsvd_deploy.format.schema import CheckpointConfig

    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    modules = CheckpointConfig.read(config).modules
    original, compressed = models(llama, directory, dtype)
    recover_settings = Recover(**({"steps": 12, "batch_size": 4} | settings))
    return recover_decoder(original, compressed, samples, recover_settings, modules, CacheFolder(work))


@pytest.fixture
def compressed(write_recipe: RecipeWriter) -> Path:
    return run(write_recipe(HARD, calibration=CALIBRATION))[1]


@pytest.fixture
def samples() -> list[Sample]:
    return text_samples(torch.randint(3, 250, (24, 32), generator=torch.Generator().manual_seed(1)))


def test_layers_in_16_bits_are_trained_in_32(
    llama: Path, compressed: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """Steps far below the precision of bfloat16 add up, as they do in float32."""
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        work = tmp_path / str(dtype)
        outcome = recovered_by_hand(llama, compressed, samples, work, dtype, learning_rate=2e-4, steps=40)
        stored = FileStore(outcome.files)
        assert {stored.info(name).dtype for name in stored.names() if name.endswith("factor_a.weight")} == {
            "F32"
        }
        runs[dtype] = outcome.layers
    for single, half in zip(*runs.values(), strict=True):
        assert half.is_kept
        assert half.error_after == pytest.approx(single.error_after, rel=0.05)


def test_tokens_of_no_weight_do_not_count(
    llama: Path, compressed: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """Whatever stands at positions of weight 0, behind all others, the layers learn the same."""
    weights = torch.cat([torch.ones(16), torch.zeros(16)])
    weighted = [Sample(sample.tokens, {}, weights) for sample in samples]
    noise = torch.randint(3, 250, (24, 16), generator=torch.Generator().manual_seed(2))
    disturbed = [
        Sample(torch.cat([sample.tokens[:16], row]), {}, weights)
        for sample, row in zip(samples, noise, strict=True)
    ]
    found = [
        recovered_by_hand(llama, compressed, each, tmp_path / str(index)).layers
        for index, each in enumerate((weighted, disturbed, samples))
    ]
    for weighed, other, unweighed in zip(*found, strict=True):
        assert asdict(weighed) == pytest.approx(asdict(other), rel=1e-3)
        assert weighed.error_after != pytest.approx(unweighed.error_after, rel=1e-3)


def test_replaced_tokens_are_of_the_vocabulary_and_leave_pictures_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(10, 200, (7, 4, 50), generator=generator)
    picture = {"pixel_values": torch.zeros(4, 3)}
    batches = [
        Batch(each, picture if index == 2 else {}, torch.rand(4, 50), tuple(range(4)))
        for index, each in enumerate(tokens)
    ]
    found = _with_replaced_tokens(batches, 0.3, 250)
    assert [index for index in range(7) if found[index] is not batches[index]] == [0, 4, 6]
    for index in (0, 4, 6):
        changed = found[index].tokens != batches[index].tokens
        assert 0.2 < float(changed.float().mean()) < 0.4
        assert 200 <= int(found[index].tokens.max()) < 250
        assert found[index].token_weights is batches[index].token_weights
    again = _with_replaced_tokens(batches, 0.3, 250)
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(found, again, strict=True))
    assert all(
        one is other for one, other in zip(_with_replaced_tokens(batches, 0.0, 250), batches, strict=True)
    )


REFUSED = {
    "before the factors": ([recover(), HARD], "has nothing to train yet"),
    "twice": ([HARD, recover(), recover()], "repeats stages.1.recover"),
    "one batch": ([HARD, recover(batch_size=13)], "lower batch_size, or draw more samples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_that_cannot_recover_are_refused(
    case: str, write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    stages, message = REFUSED[case]
    code, _, err = invoke("run", write_recipe(*stages, calibration=CALIBRATION))
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.vllm
def test_vllm_serves_recovered_factors_and_scales(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(
        factorize(compression_ratio=0.4, num_compressed_layers="all", layout="pivoted", rank_multiple=64),
        recover(steps=10, batch_size=8, learning_rate=5e-4),
        {"quantize": {"bits": 4, "group_size": 64}},
        recover(steps=10, batch_size=8),
        model={"path": TINY_LLAMA},
        gates={"serving_parity": {"mean_difference": 0.05, "eager": True}},
        calibration=CALIBRATION | {"num_samples": 64, "sequence_length": 64},
    )
    code, _, err = invoke("run", recipe)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    for kind in ("recover", "recover_quantized"):
        for layer in report[kind]["layers"]:
            assert layer["error_after"] < layer["error_before"]
    assert 0 < report["serving"]["mean_difference"] < 0.05
