"""A recipe is accepted as it was meant, or refused with a line that says where, what and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ercsvd_deploy.recipe.fields import REFUSAL
from ercsvd_deploy.recipe.load import HubDataset, JsonLines, Recipe, TextFile, canonical, load_recipe
from ercsvd_deploy.recipe.messages import EXPECTATIONS, fields_at
from tests.recipe.written import MINIMAL, VISION, problems_of, written


def test_defaults_of_a_minimal_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL))
    assert canonical(recipe) == {
        "model": {"path": "some/model", "revision": None, "dtype": "auto", "trust_remote_code": False},
        "calibration": {
            "dataset": {"share": None, "text": "text.txt"},
            "datasets": [],
            "num_samples": 256,
            "sequence_length": 2048,
            "seed": 3,
            "token_weight": "unit_norm",
        },
        "vision": None,
        "stages": [
            {
                "factorize": {
                    "method": "erc_svd",
                    "compression_ratio": 0.2,
                    "allocation": "last_k",
                    "output_metric": "identity",
                    "num_compressed_layers": "auto",
                    "beta": 0.05,
                    "residual_space": "weight",
                    "layout": "low_rank",
                    "rank_multiple": "auto",
                    "num_search_samples": 16,
                    "compressed_prefix_inputs": False,
                }
            }
        ],
        "target": None,
        "evaluation": {
            "perplexity": {},
            "sequence_length": None,
            "max_sequences": None,
            "visual_questions": {},
            "lm_eval": None,
        },
        "gates": None,
        "serving": {"tensor_parallel_sizes": [1]},
        "export": {"format": "vllm", "path": None, "max_shard_size": "1GB"},
    }
    assert recipe.evaluation_sequence_length == 2048
    assert recipe.quantize is None
    assert recipe.factorize is not None
    assert recipe.factorize.calibration_need == "method erc_svd measures activations"


def test_every_form_of_every_section(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(
            tmp_path,
            """\
model: {path: org/name, revision: main, dtype: float16, trust_remote_code: true}
calibration: {dataset: {jsonl: lines.jsonl, field: body}, num_samples: 8, sequence_length: 64, seed: 0}
stages:
  - factorize: {method: asvd, compression_ratio: 5e-1, num_compressed_layers: 4, activation_exponent: 1}
  - quantize:
      bits: 8
      group_size: -1
      sym: false
      damping: 0.1
      ignore: ["model.layers.0.*"]
      overrides: {"*.down_proj": {bits: 4}, "*.q_proj": {sym: true, group_size: 32}}
evaluation:
  perplexity:
    short: a.txt
    long: {text: b.txt}
    hub: {hub: org/data, config: c, split: test, revision: v1}
  sequence_length: 128
  max_sequences: 4
  lm_eval: {tasks: [piqa, arc_easy], num_fewshot: 0, limit: 10, batch_size: 2}
serving: {tensor_parallel_sizes: [1, 2, 4]}
export: {format: vllm, path: out/x, max_shard_size: 1.5MB}
""",
        )
    )
    assert recipe.calibration is not None
    assert recipe.calibration.dataset == JsonLines(jsonl=Path("lines.jsonl"), field="body")
    assert recipe.evaluation.perplexity == {
        "short": TextFile(text=Path("a.txt")),
        "long": TextFile(text=Path("b.txt")),
        "hub": HubDataset(hub="org/data", config="c", split="test", revision="v1"),
    }
    assert recipe.evaluation_sequence_length == 128
    assert recipe.factorize is not None
    assert (recipe.factorize.compression_ratio, recipe.factorize.num_compressed_layers) == (0.5, 4)
    assert recipe.quantize is not None
    assert recipe.quantize.overrides["*.q_proj"].group_size == 32
    assert recipe.quantize.overrides["*.q_proj"].bits is None
    assert recipe.export.max_shard_bytes == 1_500_000
    assert recipe.serving.tensor_parallel_sizes == (1, 2, 4)
    assert Recipe.model_validate(canonical(recipe)) == recipe


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.model.path = "other"  # type: ignore[misc]


def test_one_mistake_gives_one_line_with_place_value_and_remedy(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL.replace("compression_ratio", "compression_ration"))
    assert problems_of(path) == [
        "recipe.yaml:4:34: field 'stages.0.factorize.compression_ration' is unknown (value 0.2); "
        "did you mean 'compression_ratio'?",
    ]


@pytest.mark.parametrize(
    ("factorize", "sections", "expected"),
    [
        (
            "compression_ratio: 0.2",
            "target: {overall_bits: 3}",
            "compression_ratio' is given beside a target",
        ),
        ("", "target: {overall_bits: 3}", "allocation' is last_k, but a target needs error_controlled"),
        ("allocation: error_controlled", "target: {}", "'target' has to have exactly one of bytes"),
        ("allocation: error_controlled", "target: {bytes: 1GB, overall_bits: 3}", "exactly one of bytes"),
        ("allocation: error_controlled", "target: {model_bits: 4, overall_bits: 3}", "exactly one of bytes"),
        ("allocation: error_controlled", "target: {overall_bits: 16}", "it must be less than 16"),
        ("allocation: error_controlled", "target: {model_bits: 16}", "it must be less than 16"),
        (
            "allocation: error_controlled",
            "target: {model_bits: 4, vocabulary_bits: [8]}",
            "'target.vocabulary_bits' is set, but quantize has neither lm_head nor embeddings",
        ),
        (
            "allocation: error_controlled",
            "target: {overall_bits: 4, vocabulary_bits: [8]}",
            "overall_bits counts the decoder alone",
        ),
        ("allocation: error_controlled", "target: {overall_bits: 3, bits: [7]}", "'target.bits.0' is 7"),
        ("allocation: error_controlled", "target: {overall_bits: 3, group_sizes: [32]}", "no quantize stage"),
        ("allocation: error_controlled", "target: {overall_bits: 3, factor_bits: [3]}", "no quantize stage"),
        (
            "allocation: error_controlled",
            "target: {overall_bits: 8, bits: [2, 3]}",
            "'target.bits' is set, but there is no quantize stage; add one, or remove it",
        ),
        (
            "allocation: error_controlled",
            "target: {overall_bits: 8, corrections: [{rank: 8}]}",
            "'target.corrections' is set, but there is no quantize stage",
        ),
        ("allocation: error_controlled", "", "compression_ratio' is missing; add it, or a target"),
        (
            "compression_ratio: 0.2, allocation: uniform, num_compressed_layers: 3",
            "",
            "is given, but only allocation last_k reads it and it is uniform",
        ),
        ("compression_ratio: 0.2, num_fisher_samples: 3", "", "only output_metric fisher or allocation"),
    ],
)
def test_ratio_and_target_do_not_contradict(
    tmp_path: Path, factorize: str, sections: str, expected: str
) -> None:
    text = MINIMAL.replace("compression_ratio: 0.2", factorize or "beta: 0.05") + f"{sections}\n"
    problems = problems_of(written(tmp_path, text))
    assert any(expected in problem for problem in problems), problems


def test_beta_auto_takes_any_ratio_and_needs_sequences_to_hold_out(tmp_path: Path) -> None:
    text = MINIMAL.replace("0.2", "0.97, beta: auto")
    recipe = load_recipe(written(tmp_path, text))
    assert canonical(recipe)["stages"][0]["factorize"]["beta"] == "auto"
    few = text.replace("{dataset:", "{num_samples: 3, dataset:")
    few = few.replace("beta: auto", "beta: auto, num_search_samples: 2")
    [problem] = problems_of(written(tmp_path, few))
    assert "calibration.num_samples is 3; draw at least 4" in problem


@pytest.mark.parametrize(
    ("stages", "sections", "expected"),
    [
        (
            "recover: {}",
            "target: {overall_bits: 3}",
            "no stage that could meet it; add factorize or quantize",
        ),
        ("quantize: {}", "target: {overall_bits: 3, factor_bits: [3]}", "there is no factorize stage"),
        (
            "quantize: {correction: {rank: 8}}",
            "target: {overall_bits: 3}",
            "is given beside a target, which chooses how every matrix is stored",
        ),
        (
            "quantize: {}",
            "target: {overall_bits: 3, bits: [2, 3, 6]}\nexport: {format: compressed-tensors}",
            "has 3, 6, and compressed-tensors and vLLM agree on words of 2, 4 and 8 bits only",
        ),
        (
            "quantize: {lm_head: {bits: 8}}",
            "target: {model_bits: 5, vocabulary_bits: [5, 8]}\nexport: {format: compressed-tensors}",
            "'target.vocabulary_bits' has 5, and compressed-tensors",
        ),
        (
            "quantize: {bits: 3}",
            "target: {overall_bits: 3, bits: [2, 4]}",
            "'stages.0.quantize.bits' is 3, but target.bits is [2, 4], of which every matrix gets one",
        ),
        (
            "quantize: {group_size: 64}",
            "target: {overall_bits: 3, group_sizes: [32, 128]}",
            "'stages.0.quantize.group_size' is 64, but target.group_sizes is [32, 128]",
        ),
        (
            "quantize: {lm_head: {bits: 8}}",
            "target: {model_bits: 5, vocabulary_bits: [4, 6]}",
            "'stages.0.quantize.lm_head.bits' is 8, but target.vocabulary_bits is [4, 6]",
        ),
        (
            "quantize: {overrides: {q_proj: {correction: {rank: 8}}}}",
            "target: {overall_bits: 3}",
            "'stages.0.quantize.overrides.q_proj.correction' is given beside a target",
        ),
        ("quantize: {}", "target: {overall_bits: 3, group_sizes: []}", "a list with at least 1 entry"),
        ("quantize: {}", "target: {overall_bits: 3, bits: []}", "a list with at least 1 entry"),
        (
            "quantize: {}",
            "target: {overall_bits: 3, corrections: [{rank: 8}]}\nexport: {format: compressed-tensors}",
            "'target.corrections' are low-rank",
        ),
    ],
)
def test_a_target_of_bits_alone_is_checked(tmp_path: Path, stages: str, sections: str, expected: str) -> None:
    text = re.sub(r"factorize: \{.*\}", stages, MINIMAL) + f"{sections}\n"
    assert any(expected in problem for problem in problems_of(written(tmp_path, text)))


def test_a_target_of_bits_alone_is_a_recipe(tmp_path: Path) -> None:
    text = re.sub(r"factorize: \{.*\}", "quantize: {}", MINIMAL) + "target: {overall_bits: 3}\n"
    recipe = load_recipe(written(tmp_path, text))
    assert not recipe.may_factorize
    assert recipe.factorize is not None
    assert recipe.factorize.allocation == "error_controlled"


@pytest.mark.parametrize("method", ["svd", "asvd"])
def test_error_control_needs_the_inputs_metric(tmp_path: Path, method: str) -> None:
    text = MINIMAL.replace("method: erc_svd", f"method: {method}, allocation: error_controlled")
    assert "use svd_llm or erc_svd" in problems_of(written(tmp_path, text))[0]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("0.2", "1.5", "4:34: field 'stages.0.factorize.compression_ratio' is 1.5; it must be less than 1"),
        ("0.2", ".nan", "is nan; it must be"),
        ("0.2", "'0.2'", "is '0.2'; it must be a number (without quotes)"),
        ("0.2", "true", "is true; it must be a number"),
        ("0.2", "null", "compression_ratio' is missing; add it, or a target"),
        ("0.2", "0.96", "is 0.96, but beta 0.05 leaves room for less than 0.95; lower one of the two"),
        ("0.2", "0.2, beta: 1", "is 1; it must be 'auto' or a number of at least 0 and less than 1"),
        ("0.2", "0.2, beta: best", "is 'best'; it must be 'auto' or a number"),
        ("0.2", "0.2, beta: auto, residual_space: whitened", "makes all choices equal; use residual_space"),
        ("erc_svd", "svd_llm, beta: auto", "'stages.0.factorize.beta' is given, but only method erc_svd"),
        (
            "erc_svd",
            "svd, compressed_prefix_inputs: true",
            "only methods svd_llm and erc_svd read it and the",
        ),
        ("0.2", "0.2, num_compressed_layers: 0", "is 0; it must be 'auto', 'all' or a whole number of at"),
        ("0.2", "0.2, num_compressed_layers: most", "is 'most'; it must be 'auto', 'all' or a whole"),
        ("0.2", "0.2, rank_multiple: 1.5", "is 1.5; it must be 'auto' or a whole number"),
        ("0.2", "0.2, rank_multiple: 010", "is '010'; it must be 'auto' or a whole number"),
        ("0.2", "0.2, num_search_samples: 257", "is 257, but calibration.num_samples is 256; set num_search"),
        (
            "0.2",
            "0.2, activation_exponent: 0.5",
            "only method asvd reads it and the method is erc_svd; remove",
        ),
        ("erc_svd", "svd, beta: 0.05", "(on the command line: --set stages.0.factorize.beta=null)"),
        ("erc_svd", "ercsvd", "it must be 'svd', 'asvd', 'svd_llm' or 'erc_svd'; did you mean 'erc_svd'?"),
        ("erc_svd", "asvd, activation_exponent: 0", "is 0; it must be greater than 0"),
        ("- factorize", "- factorise", "did you mean 'factorize'?"),
        ("- factorize: ", "- ", "a stage has exactly one of factorize, recover, quantize: add one"),
        (
            "- factorize",
            "- quantize: {}\n    factorize",
            "has factorize and quantize; a stage has exactly one",
        ),
        (
            "- factorize",
            "- quantize: {}\n  - factorize",
            "5:5: field 'stages.1.factorize' comes after stages.0.q",
        ),
        ("- factorize", "- svd\n  - factorize", "'stages.0' is 'svd'; a stage is a mapping with one of"),
        ("  - ", "  - factorize: {method: svd, compression_ratio: 0.5}\n  - ", "repeats stages.0.factorize"),
        (
            "  - ",
            "  - quantize: {bits: 7}\n  - ",
            "quantize.bits' is 7; it must be 2, 3, 4, 5, 6 or 8",
        ),
        (
            "  - ",
            "  - quantize: {overrides: {x: {}}}\n  - ",
            "overrides nothing; give bits, group_size or sym",
        ),
        (
            "  - ",
            "  - quantize: {overrides: {x: {bit: 4}}}\n  - ",
            "overrides.x.bit' is unknown (value 4); did",
        ),
        ("  - ", "  - quantize: {ignore: [a, a]}\n  - ", "has 'a' twice; list each once"),
        ("  - ", "  - quantize: {correction: {rank: 9}}\n  - ", "rank' is 9; it must be a multiple of 8"),
        ("  - ", f"  - quantize: {{bits: {2**70}}}\n  - ", "it must be a whole number of at most 18 digits"),
        (
            "stages:",
            "target: {bytes: 1GB, corrections: [{rank: 8}, {rank: 8}]}\nstages:",
            "'target.corrections' has {rank: 8, bits: 8} twice; list each once",
        ),
        ("some/model", "''", "'model.path' is ''; it must be text that is not empty"),
        ("some/model", "7", "'model.path' is 7; it must be text (if it is meant as text, put it in quotes)"),
        ("{path: some/model}", "some/model", "1:1: field 'model' is 'some/model'; it must be a mapping"),
        ("path: some/model", "path: some/model, dtype: BF16", "did you mean 'bfloat16'?"),
        ("model:", "modell:", "did you mean 'model'?"),
        ("{text: text.txt}", "{text: ''}", "'calibration.dataset.text' is empty; give a path"),
        (
            "{text: text.txt}",
            "{txt: a}",
            "exactly one of text, jsonl, parquet, saved, hub: did you mean 'text'?",
        ),
        ("{text: text.txt}", "{text: a, hub: b}", "has text and hub; a dataset has exactly one"),
        ("{text: text.txt}", "{text: a, split: b}", "is unknown (value 'b'); known here: share, text"),
        ("{text: text.txt}", "a.txt", "2:15: field 'calibration.dataset' is 'a.txt'; a dataset is a mapping"),
        ("text.txt}", "text.txt}, seed: -1", "'calibration.seed' is -1; it must be at least 0"),
        ("stages:", "serving: {tensor_parallel_sizes: [2, 2]}\nstages:", "has 2 twice; list each once"),
        (
            "stages:",
            "serving: {tensor_parallel_sizes: []}\nstages:",
            "is []; it must be a list with at least 1",
        ),
        ("stages:", "serving: {tensor_parallel_sizes: 2}\nstages:", "is 2; it must be a list"),
        ("stages:", "evaluation: {perplexity: {a b: x}}\nstages:", "is 'a b'; it must be text that matches"),
        ("stages:", "evaluation: {perplexity: x}\nstages:", "is 'x'; it must be a mapping (name: value)"),
        ("stages:", "evaluation: {lm_eval: {}}\nstages:", "'evaluation.lm_eval.tasks' is missing; add it"),
        (
            "stages:",
            "evaluation: {lm_eval: {tasks: [piqa], eager: true}}\nstages:",
            "'evaluation.lm_eval.eager' is for `engine: vllm`; remove it, or set that",
        ),
        ("stages:", "export: {max_shard_size: 5 gigs}\nstages:", "is '5 gigs'; it must be text that matches"),
        ("stages:", "export: {max_shard_size: 0.0GB}\nstages:", "is '0.0GB'; give a size such as 5GB"),
        ("stages:", "export: {format: gguf}\nstages:", "is 'gguf'; it must be 'vllm'"),
        (
            "calibration: {dataset: {text: text.txt}}",
            "",
            "1:1: field 'calibration' is missing, but method erc_svd",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_the_remedy(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in MINIMAL
    problems = problems_of(written(tmp_path, MINIMAL.replace(old, new, 1)))
    assert any(expected in problem for problem in problems), problems
    assert all(problem.startswith("recipe.yaml:") for problem in problems)


@pytest.mark.parametrize(
    "value", [2**70, 9, 1.5, "inf", "\ud800", "a b", "", {1: 2}, [], [1, 1], [{"rank": 9}], {"a": None}]
)
def test_every_kind_of_wrong_value_is_told_in_our_words(value: Any) -> None:
    """Whatever the field and the value, no message is pydantic's."""
    stages = ("factorize", "quantize", "recover")
    places: list[tuple[Any, ...]] = [
        *((name,) for name in Recipe.model_fields),
        *(("stages", n, k) for n, k in enumerate(stages)),
    ]
    places += [(*place, name) for place in places for name in fields_at(place)]
    found = set()
    for *sections, last in places:
        recipe: dict[str, Any] = {"model": {"path": "m"}, "stages": [{name: {}} for name in stages]}
        inner: Any = recipe
        for name in sections:
            inner = inner[name] if isinstance(inner, list) else inner.setdefault(name, {})
        inner[last] = value
        try:
            Recipe.model_validate(recipe)
        except ValidationError as error:
            found |= {detail["type"] for detail in error.errors()}
    assert found <= {REFUSAL, "extra_forbidden", "missing", *EXPECTATIONS}


@pytest.mark.parametrize("layers", ["all", "3"])
def test_svd_of_given_layers_needs_no_calibration(tmp_path: Path, layers: str) -> None:
    options = f"method: svd, compression_ratio: 0.2, num_compressed_layers: {layers}"
    text = f"model: {{path: m}}\nstages: [factorize: {{{options}}}]"
    assert load_recipe(written(tmp_path, text)).calibration is None
    searching = written(tmp_path, text.replace(f"layers: {layers}", "layers: auto"))
    assert "num_compressed_layers auto measures the final layer's error" in problems_of(searching)[0]
    with_text = written(tmp_path, f"{text}\nevaluation: {{perplexity: {{a: b.txt}}}}")
    assert "'evaluation.sequence_length' is missing, and without calibration" in problems_of(with_text)[0]
    assert load_recipe(with_text, ["evaluation.sequence_length=64"]).evaluation_sequence_length == 64


def test_quantization_alone_needs_calibration(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {path: m}\nstages: [quantize: {}]")
    assert "method gptq measures activations (stages.0)" in problems_of(path)[0]
    assert load_recipe(path, ["calibration.dataset.text=a"]).factorize is None


@pytest.mark.parametrize(
    ("override", "share"),
    [
        ("vision.token_weight=2", 1.0),
        ("calibration.dataset={text: text.txt}", 0.5),
        ("vision={}", None),
    ],
)
def test_share_of_pictures(tmp_path: Path, override: str, share: float | None) -> None:
    path = written(tmp_path, VISION)
    if share is None:
        assert "field 'calibration.dataset' is missing" in "\n".join(problems_of(path, override))
    else:
        assert load_recipe(path, [override]).picture_share == share


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["vision.share=0.5"],
            "'calibration.dataset' is missing, and vision.share 0.5 leaves a part for text",
        ),
        (["vision.share=0"], "'vision.share'"),
        (
            ["vision.share=1", "calibration.dataset={text: text.txt}"],
            "'calibration.dataset' would not be used, since vision.share is 1",
        ),
        (
            ["vision={share: 0.5}", "calibration.dataset={text: t.txt}"],
            "'vision.share' is set, but there is no vision.calibration",
        ),
        (["calibration=null"], "'calibration' is missing"),
        (
            ["vision={token_weight: 2}", "calibration.dataset={text: t.txt}"],
            "'vision.token_weight' is 2, but without vision.calibration there are no image tokens",
        ),
        (
            ["vision={compress_tower: true}", "calibration.dataset={text: t.txt}"],
            "'vision.compress_tower' is true, but method erc_svd measures activations",
        ),
        (
            ["vision.compress_projector=true", "stages=[{quantize: {bits: 4}}]"],
            "'vision.compress_projector' is true, but there is no factorize stage",
        ),
        (["vision.calibration={}"], "a dataset of pictures has exactly one of conversations, folder, hub"),
        (["vision.calibration={folder: a, hub: b}"], "has folder and hub"),
        (["evaluation.visual_questions={q: {dataset: {folder: a}}}"], "exactly one of conversations, hub"),
        (["vision.calibration.prompt=what"], "'vision.calibration"),
    ],
)
def test_contradictions_about_pictures(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert expected in "\n".join(problems_of(written(tmp_path, VISION), *overrides))
