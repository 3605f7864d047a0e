"""Every vision-language family: as `test_served_families`, with pictures in calibration and in questions.

Where vLLM shows a family no pictures here (its processor may need torchvision), texts alone are asked about.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.models.description.families import attention_implementation
from ercsvd_deploy.models.description.meta import load_config
from ercsvd_deploy.models.description.tensor_parallel import cuts_inputs
from tests.families.dense import materialise
from tests.families.served import STAGES, compress, in_dtype, judge, reference, run_in_their_dtypes
from tests.families.shown import Questions, conversation_file, samples
from tests.families.table import NUM_RANKS, RESULTS, kind_of_export
from tests.families.tiny_vision_families import FAMILIES, save_tiny_family
from tests.families.vision_processors import make_processor
from tests.families.without_videos import leave_out_videos
from tests.models.streamed import streamed
from tests.recipe_runs import TEXT
from tests.vllm.engines import engine

pytestmark = [pytest.mark.families, pytest.mark.slow, pytest.mark.timeout(3600)]
Exports = Callable[[str], dict[str, Path]]
Answers = dict[tuple[str, str, int, bool], dict[str, Any]]
TEXT_ALONE = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
SHOWN = {"limit_mm_per_prompt": {"image": 2, "video": 0}, "max_model_len": 256}


@pytest.fixture(scope="module", autouse=True)
def _without_videos() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        leave_out_videos(patch)
        yield


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: save_tiny_family(tmp_path_factory.mktemp(family) / "model", family))


@pytest.fixture(scope="module")
def exports(originals: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Return family -> what each of `STAGES` makes of it, calibrated on text and pictures."""
    pictures = conversation_file(tmp_path_factory.mktemp("pictures"))

    @cache
    def of_family(family: str) -> dict[str, Path]:
        directory = tmp_path_factory.mktemp(f"{family}-exports")
        sections: dict[str, Any] = {
            "calibration": {
                "dataset": {"text": str(TEXT / "calibration.txt")},
                "num_samples": 16,
                "sequence_length": 160,
            }
        }
        if make_processor(family) is not None:
            sections["vision"] = {"calibration": {"conversations": str(pictures)}, "share": 0.5}
        return {dtype: compress(originals(family), directory / dtype, dtype, sections) for dtype in STAGES}

    return of_family


@pytest.fixture(scope="module")
def questions(
    originals: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Questions]:
    """Return family -> what is asked about pictures; nothing, where there is no processor here."""
    return cache(lambda family: Questions.ask(family, originals(family), tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest,
    exports: Exports,
    questions: Callable[[str], Questions],
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """Return (family, dtype of its export, ranks, whether pictures are shown) -> what vLLM generated."""
    families = {item.callspec.params["family"] for item in request.session.items if hasattr(item, "callspec")}
    keys = [(family, dtype) for family in FAMILIES if family in families for dtype in STAGES]
    work = tmp_path_factory.mktemp("engines")
    found: Answers = {}
    for num_ranks in NUM_RANKS:
        jobs = {}
        for family, dtype in keys:
            served = engine(exports(family)[dtype], dtype, num_ranks=num_ranks)
            jobs[family, dtype, num_ranks, False] = served | TEXT_ALONE
            if prompts := questions(family).prompts:
                jobs[family, dtype, num_ranks, True] = served | SHOWN | {"prompts": prompts}
        found |= run_in_their_dtypes(jobs, work / f"{num_ranks}")
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_transformers_loads_what_was_written(
    family: str, originals: Callable[[str], Path], exports: Exports, tmp_path: Path
) -> None:
    given = samples(family, originals(family))
    before = tensors_of(originals(family))
    for dtype, directory in exports(family).items():
        raw = json.loads((directory / "config.json").read_text())
        described = CheckpointConfig.read(raw["quantization_config"]).modules
        # Nothing but Linears of the language model has changed, not one bit of tower and projector.
        tensors = tensors_of(directory)
        kept = {name for name in before if name.rpartition(".")[0] not in described or name.endswith("bias")}
        assert len(before) - len(kept) == len([each for each in described.values() if each.is_altered])
        assert all(torch.equal(tensors[name], before[name]) for name in kept)
        assert any("vision" in name or "visual" in name for name in kept)
        attention = attention_implementation(load_config(str(directory)))
        model = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention
        ).eval()
        dense = reference(materialise(directory, tmp_path / dtype))
        for sample in given:
            types = {name: kinds[None] for name, kinds in sample.token_types.items()}
            inputs = {"input_ids": sample.tokens[None], **sample.images, **types}
            expected, found = dense(**inputs).logits, model(**inputs).logits
            assert float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))
        if make_processor(family) is not None:
            assert samples_are_the_same(given, samples(family, directory))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, those of experts one by one, under the names of the hub."""
    model = streamed(directory)
    return {
        model.architecture.checkpoint_name(name): tensor
        for name, tensor in model.store.read(model.store.names()).items()
    }


def samples_are_the_same(one: list[Sample], other: list[Sample]) -> bool:
    """Whether the processor that came with an export makes what the original's makes."""
    return all(
        torch.equal(left.tokens, right.tokens)
        and left.images.keys() == right.images.keys()
        and all(torch.equal(tensor, right.images[name]) for name, tensor in left.images.items())
        for left, right in zip(one, other, strict=True)
    )


@pytest.mark.vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_serves_it_with_the_same_numbers(
    family: str,
    exports: Exports,
    questions: Callable[[str], Questions],
    answers: Answers,
    tmp_path: Path,
) -> None:
    verdicts = {}
    asked = questions(family)
    dense = {
        dtype: materialise(directory, tmp_path / f"{dtype}-dense")
        for dtype, directory in exports(family).items()
    }
    for (dtype, directory), num_ranks in product(exports(family).items(), NUM_RANKS):
        work = tmp_path / f"{dtype}-{num_ranks}"
        answer = answers[family, dtype, num_ranks, False]
        verdict = judge(dense[dtype], directory, answer, work / "texts", TEXT_ALONE, num_ranks=num_ranks)
        verdicts[kind_of_export(dtype, num_ranks)] = in_dtype(verdict, dtype, answer)
        for name, kind in answer.get("cut", {}).items():
            assert cuts_inputs(name) == (kind == "RowParallelLinear"), f"{name} is a {kind}"
        verdict = "not tried"
        if asked.prompts:
            answer = answers[family, dtype, num_ranks, True]
            options = SHOWN | {"prompts": asked.prompts}
            verdict = judge(
                dense[dtype],
                directory,
                answer,
                work / "pictures",
                options,
                asked.samples,
                num_ranks=num_ranks,
            )
            verdict = in_dtype(verdict, dtype, answer)
        verdicts[kind_of_export(dtype, num_ranks, pictures=True)] = verdict
    results = json.loads(RESULTS.read_text())
    if os.environ.get("ERCSVD_UPDATE_FAMILIES"):
        results[family] = verdicts
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    assert results.get(family) == verdicts
