"""Serving parity without vLLM: what is asked, how answers are compared, and what is held meanwhile."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.exporters.vllm.engines import machine as serving_machine
from ercsvd_deploy.exporters.vllm.engines.machine import GIB, ServingMachine
from ercsvd_deploy.exporters.vllm.engines.process import ServedPrompt
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines import flow as run
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.inputs.model import open_model, stream
from ercsvd_deploy.pipelines.inputs.parity_prompts import (
    NUM_DECODED,
    ParityPrompt,
    longest_prompt,
    make_prompts,
)
from ercsvd_deploy.pipelines.inputs.run_data import RunData, load_run_data
from ercsvd_deploy.pipelines.judging.gates import judge_gates
from ercsvd_deploy.pipelines.judging.parity import measure as serving_parity
from ercsvd_deploy.pipelines.judging.parity.comparison import (
    Agreement,
    Difference,
    Served,
    compare,
    misread_prompt,
)
from ercsvd_deploy.pipelines.judging.parity.measure import ServingFailure, SizeParity, log_path, summarise
from ercsvd_deploy.pipelines.reporting.html.page import make_page
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE, load_report
from ercsvd_deploy.pipelines.reporting.report.json_values import finite
from ercsvd_deploy.recipe.gates import Gates
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.sections import ModelSource
from tests.judging.vllm_stand_in import FOUND, StandIn, continue_naively
from tests.recipe_runs import RecipeWriter, factorize, invoke
from tests.reporting.sample_reports import sample_document

CPU = torch.device("cpu")


@pytest.fixture
def reference(llama: Path) -> LayerwiseModel:
    return stream(open_model(ModelSource(path=str(llama))), CPU)


def prompts_of(*lengths: int) -> list[ParityPrompt]:
    tokens = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 250, (length,), generator=tokens) for length in lengths]
    return [ParityPrompt("texts", Sample(row), ServedPrompt(row.tolist())) for row in drawn]


def answers_of(llama: Path, prompts: Sequence[ParityPrompt], num_decoded: int = 5) -> list[Served]:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    return [Served.read(continue_naively(model, prompt.served.tokens, num_decoded)) for prompt in prompts]


def test_a_correct_server_agrees_on_prompts_and_on_every_step(llama: Path, reference: LayerwiseModel) -> None:
    prompts = prompts_of(7, 12, 7)
    [found] = compare(reference, prompts, {1: answers_of(llama, prompts)})[1]
    assert (found.subject, found.num_prompts) == ("texts", 3)
    assert (found.prompt.num_tokens, found.decoded.num_tokens) == (6 + 11 + 6, 3 * 5)
    assert found.together.num_tokens == 23 + 15
    assert found.together.largest < 1e-4
    assert found.greedy_agreeing == 15


def test_differences_are_those_of_each_token(llama: Path, reference: LayerwiseModel) -> None:
    prompts = prompts_of(4, 6)
    right = answers_of(llama, prompts, 2)
    wrong = [
        replace(right[0], prompt_logprobs=tuple(value - 0.25 for value in right[0].prompt_logprobs)),
        replace(
            right[1], decoded_logprobs=(right[1].decoded_logprobs[0] + 1.5, right[1].decoded_logprobs[1])
        ),
    ]
    [found] = compare(reference, prompts, {2: wrong})[2]
    assert found.prompt.mean == pytest.approx(3 * 0.25 / 8, abs=1e-4)
    assert found.prompt.largest == pytest.approx(0.25, abs=1e-4)
    assert found.decoded.mean == pytest.approx(1.5 / 4, abs=1e-4)
    assert found.decoded.largest == pytest.approx(1.5, abs=1e-4)
    assert found.together.mean == pytest.approx((3 * 0.25 + 1.5) / 12, abs=1e-4)
    assert found.worst_mean == found.decoded.mean


def test_tokens_that_are_not_the_references_choice_are_counted(
    llama: Path, reference: LayerwiseModel
) -> None:
    prompts = prompts_of(6)
    [right] = answers_of(llama, prompts, 4)
    other = right.decoded[0] + 1 if right.decoded[0] < 249 else 3
    swapped = replace(right, decoded=(other, *right.decoded[1:]))
    [found] = compare(reference, prompts, {1: [swapped]})[1]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*right.prompt, *swapped.decoded]])).logits[0]
    choices = logits.argmax(-1).tolist()[5:-1]
    assert found.greedy_agreeing == sum(a == b for a, b in zip(choices, swapped.decoded, strict=True)) < 4


def test_each_size_is_compared_on_what_it_generated(llama: Path, reference: LayerwiseModel) -> None:
    prompts = prompts_of(9, 5)
    right = answers_of(llama, prompts)
    shifted = [replace(each, prompt_logprobs=tuple(v + 1 for v in each.prompt_logprobs)) for each in right]
    found = compare(reference, prompts, {1: right, 2: shifted})
    assert found[1][0].prompt.mean < 1e-4
    assert found[2][0].prompt.mean == pytest.approx(1, abs=1e-4)


def test_places_of_image_features_are_left_out(llama: Path, reference: LayerwiseModel) -> None:
    image_token = 200
    tokens = torch.tensor([1, 5, image_token, image_token, 9, 11])
    prompts = [ParityPrompt("pictures", Sample(tokens), ServedPrompt([1, 5, image_token, 9, 11]))]
    [right] = answers_of(llama, [replace(prompts[0], served=ServedPrompt(tokens.tolist()))], 3)
    logprobs = list(right.prompt_logprobs)
    logprobs[1] -= 50  # the first image token's, second of the tokens that are predicted
    [found] = compare(
        reference, prompts, {1: [replace(right, prompt_logprobs=tuple(logprobs))]}, image_token
    )[1]
    assert (found.subject, found.prompt.num_tokens) == ("pictures", 3)
    assert found.prompt.largest < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_the_worst(value: float, llama: Path, reference: LayerwiseModel) -> None:
    prompts = prompts_of(4)
    [right] = answers_of(llama, prompts, 2)
    [found] = compare(reference, prompts, {1: [replace(right, decoded_logprobs=(value, 0.0))]})[1]
    parity = summarise((SizeParity(1, "eager", 1.0, (found,)),), (), {}, "0")
    assert parity.mean_difference == float("inf")
    gates = Gates.model_validate({"serving_parity": 1e9})
    [result] = judge_gates(gates, sample_document(serving=finite(asdict(parity))))  # as JSON has it
    assert not result.passed


def test_other_tokens_than_ours_are_told(llama: Path) -> None:
    prompts = prompts_of(5, 5)
    right = answers_of(llama, prompts, 1)
    assert misread_prompt(prompts, right) is None
    longer = replace(right[1], prompt=(*right[1].prompt, 7))
    assert "as 6 tokens, of which this package makes 5" in str(misread_prompt(prompts, [right[0], longer]))


def test_prompts_leave_room_for_what_is_generated(reference: LayerwiseModel) -> None:
    positions = reference.config.max_position_embeddings
    texts = {"a": torch.zeros(9, positions, dtype=torch.long), "b": torch.zeros(2, 40, dtype=torch.long)}
    prompts = make_prompts(texts, (), reference.config)
    lengths = [len(prompt.sample.tokens) for prompt in prompts]
    assert lengths == [min(512, positions - NUM_DECODED)] * 4 + [40] * 2
    assert longest_prompt(reference.config) == positions - NUM_DECODED


def run_with_gate(write_recipe: RecipeWriter, *arguments: str, **sections: Any) -> tuple[int, str, str]:
    recipe = write_recipe(factorize(), gates={"serving_parity": 0.05, "built_in_text": False}, **sections)
    return invoke("run", recipe, *arguments)


def test_every_size_that_this_machine_has_cores_for(
    write_recipe: RecipeWriter, in_place_of_vllm: Callable[..., StandIn], tmp_path: Path
) -> None:
    vllm = in_place_of_vllm()
    code, out, _ = run_with_gate(write_recipe, serving={"tensor_parallel_sizes": [4, 2, 1]})
    assert code == 0
    assert [asked["tensor_parallel_size"] for asked in vllm.asked] == [1, 2]
    assert [asked["enforce_eager"] for asked in vllm.asked] == [False, False]
    assert vllm.asked[1]["distributed_executor_backend"] == "mp"
    assert all("limit_mm_per_prompt" not in asked for asked in vllm.asked)
    assert "serving parity was not measured at tensor-parallel size 4: it takes 4 cores" in out
    serving = json.loads((tmp_path / "out" / REPORT_FILE).read_text())["serving"]
    assert [size["tensor_parallel_size"] for size in serving["sizes"]] == [1, 2]
    assert set(serving["not_measured"]) == {"4"}
    assert 0 <= serving["mean_difference"] < 1e-4
    assert "64 of 64" in out  # four windows, sixteen tokens each
    assert not log_path(tmp_path / "out").exists()
    assert "measured_export" in load_report(tmp_path / "out").seconds


def test_errors_in_decoding_alone_miss_the_gate(
    write_recipe: RecipeWriter, in_place_of_vllm: Callable[..., StandIn], tmp_path: Path
) -> None:
    in_place_of_vllm(error=0.1)
    code, _, err = run_with_gate(write_recipe)
    assert code == 3
    assert "serving_parity: 0.1 > 0.05" in err
    [size] = json.loads((tmp_path / "out" / REPORT_FILE).read_text())["serving"]["sizes"]
    assert size["agreements"][0]["together"]["mean"] < 0.05  # which the prompts alone would have hidden


def test_eager_is_a_switch(write_recipe: RecipeWriter, in_place_of_vllm: Callable[..., StandIn]) -> None:
    vllm = in_place_of_vllm()
    eager = {"serving_parity": {"mean_difference": 0.05, "eager": True}, "built_in_text": False}
    assert invoke("run", write_recipe(factorize(), gates=eager))[0] == 0
    assert vllm.asked[0]["enforce_eager"] is True


def test_a_failure_is_told_everywhere(
    write_recipe: RecipeWriter, in_place_of_vllm: Callable[..., StandIn], tmp_path: Path
) -> None:
    in_place_of_vllm(fails_at=[2])
    junit = tmp_path / "gates.xml"
    code, out, err = run_with_gate(
        write_recipe, "--junit", str(junit), serving={"tensor_parallel_sizes": [1, 2]}
    )
    assert code == 3
    export = tmp_path / "out"
    log = log_path(export)
    assert log == tmp_path / "out.vllm.log"
    assert log.read_text().count("what vLLM printed") == 2
    assert "==== vLLM serves" in log.read_text()
    assert "vLLM failed at tensor-parallel size 2; Worker_TP1 failed first:\n" + FOUND in out
    assert str(log) in out.replace("\n", "")
    one_line = "Worker_TP1: RuntimeError: no kernel for this shape: [3, 5]"
    assert one_line in err
    assert one_line in junit.read_text()
    report = load_report(export)
    assert report.serving is not None
    assert report.serving.mean_difference is None
    assert [size.tensor_parallel_size for size in report.serving.sizes] == [1]
    page = make_page(report, export)
    folded = page.partition('<details class="failure">')[2].partition("</details>")[0]
    assert "<pre>RuntimeError: no kernel for this\nshape: [3, 5]" in folded
    assert "  &lt;frame&gt;\n" in folded
    assert str(log) in folded
    card = (export / "README.md").read_text()
    assert "vLLM failed to serve it at tensor-parallel size 2" in card
    assert "RuntimeError" not in card
    assert str(tmp_path) not in card
    code, _, again = invoke("check", export)
    assert code == 3
    assert one_line in again
    assert invoke("verify", export)[0] == 0


def test_the_log_of_an_earlier_failure_goes_with_it(
    write_recipe: RecipeWriter, in_place_of_vllm: Callable[..., StandIn], tmp_path: Path
) -> None:
    log_path(tmp_path / "out").write_text("of an earlier run")
    in_place_of_vllm()
    assert run_with_gate(write_recipe)[0] == 0
    assert not log_path(tmp_path / "out").exists()


def test_nothing_measured_is_a_missed_gate(
    write_recipe: RecipeWriter, in_place_of_vllm: Callable[..., StandIn]
) -> None:
    in_place_of_vllm()
    code, _, err = run_with_gate(write_recipe, serving={"tensor_parallel_sizes": [4]})
    assert code == 3
    assert "not measured (tensor-parallel size 4: it takes 4 cores, and this machine has 2)" in err


def alive_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, torch.Tensor) and not found.is_meta]


INT4 = {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}
RECOVER = {"recover": {"steps": 2, "batch_size": 2}}
FISHER = {"output_metric": "fisher", "allocation": "error_controlled", "compressed_prefix_inputs": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages",
    [
        [factorize(method="erc_svd", rank_multiple=32), INT4],
        [factorize(rank_multiple=32, **FISHER), RECOVER, INT4, RECOVER],
    ],
    ids=["searched", "allocated and recovered"],
)
def test_nothing_is_held_when_vllm_starts(
    stages: list[dict[str, Any]],
    write_recipe: RecipeWriter,
    in_place_of_vllm: Callable[..., StandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a run has made on its device is gone by then: on a GPU vLLM would want that memory.

    Of all tensors that are alive only those may be left that never were on the device: the data, which was
    read into memory, and buffers of models that were built without weights.
    """
    read: list[RunData] = []

    def load(*arguments: Any) -> RunData:
        read.append(load_run_data(*arguments))
        return read[0]

    monkeypatch.setattr(run, "load_run_data", load)
    vllm = in_place_of_vllm()
    left: list[list[Any]] = []

    def look() -> None:
        models = [found for found in gc.get_objects() if isinstance(found, LayerwiseModel)]
        data = [*read[0].texts.values(), *(sample.tokens for sample in read[0].samples or ())]
        in_memory = {tensor.untyped_storage().data_ptr() for tensor in data}
        allowed = {id(tensor) for tensor in before}
        allowed |= {id(buffer) for model in models for buffer in model.model.buffers()}
        left.append(
            [
                list(tensor.shape)
                for tensor in alive_tensors()
                if id(tensor) not in allowed and tensor.untyped_storage().data_ptr() not in in_memory
            ]
        )

    vllm.before = look
    recipe = load_recipe(write_recipe(*stages, gates={"serving_parity": 0.05, "logprob_kl": 100.0}))
    before = alive_tensors()
    run_recipe(recipe, device=CPU)
    assert left == [[]]


def test_the_reference_is_in_float32_where_layers_run_in_less(
    write_recipe: RecipeWriter, in_place_of_vllm: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_vllm()
    monkeypatch.setattr(
        "ercsvd_deploy.pipelines.inputs.model.compute_dtype", lambda *_: torch.bfloat16
    )  # as on a GPU
    report, _ = run_recipe(load_recipe(write_recipe(gates={"serving_parity": 0.05})), device=CPU)
    assert report.serving is not None
    assert report.serving.largest_difference is not None
    assert report.serving.largest_difference < 1e-4


def test_memory_is_given_back_before_it_is_counted(
    reference: LayerwiseModel,
    llama: Path,
    write_recipe: RecipeWriter,
    in_place_of_vllm: Callable[..., StandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm = in_place_of_vllm()
    monkeypatch.setattr(serving_parity, "find_machine", serving_machine.find_machine)
    monkeypatch.setattr(serving_machine, "_is_built_for_cpus", lambda: False)
    events: list[str] = []

    def note(event: str, answer: Any = None) -> Callable[..., Any]:
        def noting(*_arguments: Any) -> Any:
            events.append(event)
            return answer

        return noting

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", note("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", note("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", note("mem_get_info", (20 * GIB, 40 * GIB)))
    vllm.before = note("vLLM")
    sizes = {"tensor_parallel_sizes": [1, 2, 4]}
    recipe = load_recipe(write_recipe(gates={"serving_parity": 0.05}, serving=sizes))
    nothing = Difference(0.0, 0.0, 1)
    agreements = (Agreement("texts", 1, nothing, nothing, nothing, 1),)
    monkeypatch.setattr(serving_parity, "compare", lambda *_: {1: agreements, 2: agreements})
    parity = serving_parity.measure_parity(llama, reference, prompts_of(5), recipe)
    asked = ["mem_get_info", "vLLM", "mem_get_info", "mem_get_info", "vLLM"]
    assert events == ["synchronize", "empty_cache", *asked]
    assert [each["gpu_memory_utilization"] for each in vllm.asked] == [0.076, 0.076]  # (2 + 1) of 40 GiB
    assert [each["kv_cache_memory_bytes"] for each in vllm.asked] == [2 * GIB, 2 * GIB]
    assert parity.not_measured == {"4": "it takes 4 GPUs, and this machine has 2"}


def test_an_occupied_gpu_is_a_failure_that_says_so(
    reference: LayerwiseModel,
    llama: Path,
    write_recipe: RecipeWriter,
    in_place_of_vllm: Callable[..., StandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm = in_place_of_vllm()
    monkeypatch.setattr(serving_parity, "find_machine", lambda: ServingMachine(1, (0, 1)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _index: (GIB, 40 * GIB))
    recipe = load_recipe(write_recipe(gates={"serving_parity": 0.05}))
    parity = serving_parity.measure_parity(llama, reference, prompts_of(5), recipe)
    assert not vllm.asked
    assert parity.mean_difference is None
    [failure] = parity.failures
    assert "1.0 of 40.0 GiB free" in failure.exception
    assert failure.log is None
    assert isinstance(failure, ServingFailure)
