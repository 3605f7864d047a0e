"""SmolLM2-135M-Instruct from its wheel to vLLM's chat endpoint, as `make demo-real`, and what it is worth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def run(*arguments: str | Path) -> str:
    """Run a command of this interpreter at the repository's root; return what it printed."""
    ran = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def real_model() -> Path:
    """Return the model's directory, made if it is not there."""
    directory = ROOT / "out/SmolLM2-135M-Instruct"
    run("examples/real_model.py", directory)
    return directory


@pytest.fixture(scope="module")
def compressed(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what recipes/demo-real.yaml makes of it; a missed gate, exit code 3, would fail here."""
    directory = tmp_path_factory.mktemp("real") / "compressed"
    entry_point = "from ercsvd_deploy.pipelines.cli.entry_point import main\nmain()"
    run("-c", entry_point, "run", "recipes/demo-real.yaml", "--output", directory)
    assert real_model.is_dir()
    return directory


def answer_of(directory: Path) -> str:
    """Ask transformers, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ercsvd_deploy.hf  # noqa: F401 - registers the format

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    text: str = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def test_the_model_is_an_ordinary_checkpoint_that_answers(real_model: Path) -> None:
    config: dict[str, Any] = json.loads((real_model / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["num_hidden_layers"]) == ("bfloat16", 30)
    assert answer_of(real_model) == ANSWER


def test_its_recipe_passes_its_gates_and_the_result_still_answers(compressed: Path) -> None:
    report: dict[str, Any] = json.loads((compressed / "ercsvd_report.json").read_text())
    original, smaller = report["original"]["perplexity"], report["compressed"]["perplexity"]
    assert set(original) == {"prose", "python"}
    assert all(1 < original[text] < 30 for text in original)  # a random model has 49,152
    assert all(smaller[text] < 3 * original[text] for text in original)
    assert "Paris" in answer_of(compressed)


@pytest.mark.vllm
def test_vllm_serves_it_at_the_chat_endpoint(compressed: Path) -> None:
    printed = run("examples/serve_and_ask.py", compressed, "--question", QUESTION)
    assert "Paris" in printed.partition(QUESTION)[2]
