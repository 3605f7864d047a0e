"""The model card: what a person who finds the export must know, and nothing of the machine it was made on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ercsvd_deploy.installation import install_command
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.reporting.card import (
    escaped,
    fenced,
    make_card,
)
from ercsvd_deploy.pipelines.reporting.report.document import parse_report
from ercsvd_deploy.pipelines.stages.export import CARD_FILE, ORIGINAL_CARD_FILE
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter
from tests.reporting.sample_reports import MINUS, everywhere_hostile, sample_document, sample_report


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(head)
    return values


def test_card_says_what_it_is_and_how_to_use_it(tmp_path: Path) -> None:
    card = make_card(sample_document(), tmp_path, Path("/srv/small"))
    assert front_matter(card) == {
        "base_model": "organisation/small-7b",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ercsvd", "vllm", "compressed", "low-rank", "svd", "gptq", "int4"],
    }
    for said in (
        "\n# small\n",
        "ERC-SVD removed 50.0 %",
        f"| Size of all tensors | 2.00 MB | 1.00 MB | {MINUS}50.0 % |  |",
        "| Perplexity, prose | 10.000 (9.500 to 10.500) | 11.000 (10.500 to 11.500) "
        "| +10.0 % (+8.0 to +12.0 %) | 64 windows |",
        "| Exact match, shapes | 90.0 % (86.9 to 93.1 %) | 87.5 % (84.4 to 90.6 %) "
        f"| {MINUS}2.5 points ({MINUS}5.5 to +0.5 points) | 80 questions |",
        "| arc, acc | 0.4500 (0.4300 to 0.4700) | 0.4375 (0.4175 to 0.4575) "
        f"| {MINUS}0.0125 ({MINUS}0.0375 to +0.0125) | 500 documents |",
        "| Log-prob KL, prose |  | 0.0500 nats (0.0400 to 0.0600) |  | 64 windows |",
        "| Increase of perplexity, prose | 10.0 % (8.0 to 12.0 %) | 20.0 % | passed |",
        f"| Loss of exact match, shapes | 2.5 points ({MINUS}0.5 to 5.5 points) | 2.0 points "
        "| undecided: about 2,880 questions would decide |",
        "| Size | 1.00 MB | 500 KB | missed |",
        f"```bash\n{install_command(beside='vllm>=0.29')}\nvllm serve out/small\n```",
        "import ercsvd_deploy.hf",
        'AutoModelForCausalLM.from_pretrained("out/small")',
        "method: erc_svd",
        "- the texts are short",
    ):
        assert said in card, said


def test_rounding_to_nearest_is_not_called_gptq(tmp_path: Path) -> None:
    report = sample_report()
    for matrix in report["quantize"]["matrices"]:
        matrix["method"] = "rtn"
    report["recipe"]["stages"][1]["quantize"]["method"] = "rtn"
    card = make_card(parse_report(report), tmp_path)
    assert "Rounding to nearest stores what is left of them as int4" in card
    assert "rtn" in front_matter(card)["tags"]
    del report["factorize"]
    alone = make_card(parse_report(report), tmp_path)
    assert "Rounding to nearest stores the decoder Linears as int4" in alone
    assert "gptq" not in card.lower()


def test_card_of_a_vision_model(tmp_path: Path) -> None:
    [language] = sample_report()["components"]
    parts = [{**language, "name": name} for name in ("language model", "vision tower", "projector")]
    card = make_card(sample_document(components=parts), tmp_path)
    assert front_matter(card)["pipeline_tag"] == "image-text-to-text"
    assert "multimodal" in front_matter(card)["tags"]
    assert "AutoModelForImageTextToText.from_pretrained" in card


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("organisation/small-7b", "organisation/small-7b"),
        ("/cache/models--organisation--small-7b/snapshots/0123abc", "organisation/small-7b"),
        ("examples/tiny-llama", None),
        ("/home/someone/models/small", None),
        ("./here/small", None),
    ],
)
def test_base_model_is_a_name_on_the_hub_or_absent(
    model: str, base: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # where examples/tiny-llama is a directory
    report = sample_document(recipe={"model": {"path": model}})
    assert front_matter(make_card(report, tmp_path)).get("base_model") == base


def test_card_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    recipe = {
        "model": {"path": "/home/someone/models/small"},
        "calibration": {"dataset": {"text": "/home/someone/texts/mine.txt"}},
        "export": {"path": "/home/someone/out/small-int4"},
    }
    card = make_card(sample_document(recipe=recipe), tmp_path, Path("/home/someone/out/small-int4"))
    assert "someone" not in card
    assert str(tmp_path) not in card
    assert "text: mine.txt" in card
    assert "vllm serve small-int4" in card


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ({"model": {"path": "a/b", "trust_remote_code": True}}, " --trust-remote-code"),
        ({"serving": {"tensor_parallel_sizes": [2, 4]}}, " --tensor-parallel-size 2"),
        ({"serving": {"tensor_parallel_sizes": [1, 4]}}, ""),
    ],
)
def test_serve_line_has_the_flags_that_are_needed(recipe: dict[str, Any], flags: str, tmp_path: Path) -> None:
    card = make_card(sample_document(recipe=recipe), tmp_path, Path("/srv/it's small"))
    assert f"vllm serve 'it'\"'\"'s small'{flags}\n" in card


@pytest.mark.parametrize(
    ("original", "files", "expected"),
    [
        (
            "---\nlicense: mit\nlanguage: [en, de]\ntags: [x]\n---\n# Hi\n",
            [],
            {"license": "mit", "language": ["en", "de"]},
        ),
        ("---\r\nlicense: mit\r\n---\r\n", [], {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE.txt\n---\n",
            ["LICENSE.txt"],
            {"license": "other", "license_name": "llama2", "license_link": "LICENSE.txt"},
        ),
        ("# No front matter\n", ["LICENSE"], {"license": "other", "license_link": "LICENSE"}),
        ("---\nlicense: {a: b}\nlanguage: [1]\n---\n", [], {}),
        ("---\nlicense: !!python/object/apply:os.system [ls]\n---\n", [], {}),
        ("---\n[unclosed\n---\n", [], {}),
        ("---\nno end", [], {}),
        (None, [], {}),
    ],
)
def test_licence_is_carried_over(
    original: str | None, files: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    if original is not None:
        (tmp_path / ORIGINAL_CARD_FILE).write_text(original, newline="")
    for name in files:
        (tmp_path / name).write_text("terms")
    card = make_card(sample_document(), tmp_path)
    known = {
        key: value for key, value in front_matter(card).items() if key.startswith(("license", "language"))
    }
    assert known == expected
    assert (f"[{ORIGINAL_CARD_FILE}]" in card) == (original is not None)


def test_original_card_that_is_not_text_is_not_read(tmp_path: Path) -> None:
    (tmp_path / ORIGINAL_CARD_FILE).write_bytes(b"---\nlicense: \xff\n---\n")
    assert "license" not in front_matter(make_card(sample_document(), tmp_path))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("in_domain", r"in\_domain"),
        ("a|b", r"a\|b"),
        ("<b>&", "&lt;b&gt;\\&"),
        ("two\nlines\r# no heading", r"two lines \# no heading"),
        ("[x](https://example.org)", r"\[x\](https&#58;//example.org)"),
        ("`code` *bold* \\", r"\`code\` \*bold\* \\"),
    ],
)
def test_escaping(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_nothing_ends_a_code_block() -> None:
    assert fenced("a\n```\nb", "yaml") == "````yaml\na\n```\nb\n````\n"


def test_names_are_only_ever_text(tmp_path: Path) -> None:
    card = make_card(parse_report(everywhere_hostile()), tmp_path)
    outside_code = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside_code
    assert "script" in outside_code
    front_matter(card)


def test_export_keeps_the_original_card_and_makes_the_same_card_twice(
    write_recipe: RecipeWriter, llama: Path
) -> None:
    original = llama / CARD_FILE
    original.write_text("---\nlicense: apache-2.0\n---\n# The original\n")
    try:
        recipe = load_recipe(write_recipe())
        _, directory = run_recipe(recipe)
        first = (directory / CARD_FILE).read_bytes()
        assert (directory / ORIGINAL_CARD_FILE).read_bytes() == original.read_bytes()
        assert front_matter(first.decode())["license"] == "apache-2.0"
        _, directory = run_recipe(recipe)
        assert (directory / CARD_FILE).read_bytes() == first
    finally:
        original.unlink()
