"""The HTML page: everything in it, nothing fetched, nothing executed, and nothing but text from outside."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ercsvd_deploy.format.files.manifest import verify_export
from ercsvd_deploy.pipelines.reporting.html import page as report_page
from ercsvd_deploy.pipelines.reporting.html.page import PAGE_FILE, make_page
from ercsvd_deploy.pipelines.reporting.html.plots import draw_plots
from ercsvd_deploy.pipelines.reporting.report import files as report_files
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE, Report, load_report, parse_report
from ercsvd_deploy.pipelines.reporting.report.files import REPORT_FILES, write_report_files
from tests.recipe_runs import RecipeWriter, invoke
from tests.reporting.page_reader import Page
from tests.reporting.sample_reports import HOSTILE, MINUS, everywhere_hostile, sample_document, sample_report

pytestmark = pytest.mark.draws
OUTSIDE = Path("/srv/models/small")


def page_of(report: Report, directory: Path = OUTSIDE) -> tuple[str, Page]:
    source = make_page(report, directory)
    page = Page(source)
    assert page.open == []
    return source, page


def test_page_says_everything() -> None:
    _, page = page_of(sample_document())
    for said in (
        "small",  # the export's name
        "ERC-SVD removed 50.0 % of the decoder Linears' parameters, in the last 2 of 3 decoder layers.",
        "GPTQ stores what is left of them as int4, in groups of 32.",
        "2 of 4 gates missed, 1 undecided",
        "64 windows",
        "10.500 to 11.500",
        "+8.0 to +12.0 %",
        "about 2,880 questions would decide",
        "2.00 MB",
        "1.00 MB",
        f"{MINUS}50.0 %",
        "11.000",
        "+10.0 %",
        "87.5 %",
        f"{MINUS}2.5 points",
        "not measured",
        "the texts are short",
        "vllm serve out/small",
        "0.0500 nats",
        "ab" * 32,
        "cd" * 32,
        "cpu (x86_64)",
        "2, compiled, with CUDA graphs",
        "0.0200, 0.2000",
        "250 of 256",
        "vLLM failed at tensor-parallel size 4; Worker_TP3 failed first",
        "RuntimeError: no room\n\nThe whole log: out/small.vllm.log\n\nTraceback (most recent call last):\n",
        "12.5 s",
        "factorize: 2 of 3 layers",
        "method: erc_svd",
        "1.mlp.up_proj",
    ):
        assert said in page.text, said


def test_page_fetches_and_runs_nothing() -> None:
    source, page = page_of(sample_document())
    assert {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "base",
        "form",
    } == set()
    policy = next(meta for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'; style-src 'unsafe-inline'")
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href", "action"):
                assert str(value).startswith("#")
    assert "@import" not in source
    assert re.findall(r"url\((?!#)", source) == []
    assert "http://" not in source.replace("http://www.w3.org/", "")
    assert "https://" not in source


def test_names_are_only_ever_text() -> None:
    harmless = page_of(sample_document())[1]
    _, page = page_of(parse_report(everywhere_hostile()), Path("/srv", HOSTILE.replace("/", "_")))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in harmless.tags}
    attributes = {name for _, found in page.tags for name in found}
    assert attributes <= {name for _, found in harmless.tags for name in found}
    assert HOSTILE in page.text


def test_plots_follow_the_page() -> None:
    plots = draw_plots(sample_document())
    assert [plot.title for plot in plots] == [
        "Quality against size",
        "Answers against size",
        "Error by layer",
        "Search over the number of layers",
        "Rank by layer",
        "Quantization loss by layer",
        "Spectra",
    ]
    assert len(plots[-1].pictures) == 2  # up_proj and down_proj
    for plot in plots:
        for picture in plot.pictures:
            assert picture.startswith("<svg viewBox=")
            assert "var(--" in picture
            # No colour of its own, no font of its own, nothing that is text drawn as curves.
            assert re.findall(r"(?:fill|stroke): ?#\w+", picture) == []
            assert "font-family" not in picture
            assert "<text" in picture
            assert len(re.findall(r' id="([^"]+)"', picture)) == len(
                set(re.findall(r' id="([^"]+)"', picture))
            )


def test_plots_are_the_same_every_time() -> None:
    assert draw_plots(sample_document()) == draw_plots(sample_document())


def test_references_are_shown_beside_the_model() -> None:
    gptq = {"label": "plain GPTQ-4", "num_bytes": 1_200_000, "perplexity": {"prose": 10.2}}
    without, with_it = draw_plots(sample_document()), draw_plots(sample_document(references=[gptq]))
    assert "plain GPTQ-4" not in without[0].pictures[0]
    assert "plain GPTQ-4" in with_it[0].pictures[0]
    assert "diamonds: others" in with_it[0].caption


@pytest.mark.parametrize(
    "absent",
    [
        {"factorize": None},
        {"quantize": None},
        {"factorize": None, "quantize": None, "gates": [], "warnings": [], "change": {}},
        {"recipe": {}},
        {"recipe": {"model": 3, "stages": [1], "serving": {"tensor_parallel_sizes": "x"}, "export": []}},
    ],
)
def test_page_needs_no_part_that_a_run_may_not_have(absent: dict[str, Any]) -> None:
    _, page = page_of(sample_document(**absent))
    assert "1.00 MB" in page.text


def test_unmeasured_numbers_leave_gaps() -> None:
    report = sample_report()
    for part in ("original", "compressed"):
        report[part]["perplexity"] = {"prose": None}
        report[part]["exact_match"] = {}
    report["change"]["layer_errors"] = {"prose": [0.1, None, 0.3]}
    for linear in report["factorize"]["linears"]:
        linear["spectrum"] = [[1, 0.0], [2, None]]
    for matrix in report["quantize"]["matrices"]:
        matrix["gptq_loss"] = matrix["rtn_loss"] = 0.0
    _, page = page_of(parse_report(report))
    assert "\N{EN DASH}" in page.text
    assert "nan" not in page.text.lower().replace("provenance", "")


def test_run_writes_page_and_card_and_verify_accepts_them(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(gates={"max_size_ratio": 0.01, "built_in_text": False})
    code, _, _ = invoke("run", recipe)
    assert code == 3
    directory = tmp_path / "out"
    assert {path.name for path in directory.iterdir()} >= REPORT_FILES
    page = Page((directory / PAGE_FILE).read_text())
    assert "1 of 1 gates missed" in page.text  # judged after the export was written
    assert "**" not in (directory / "README.md").read_text()
    assert verify_export(directory, unlisted=REPORT_FILES).problems == ()
    assert invoke("verify", directory)[0] == 0

    made = (directory / PAGE_FILE).read_bytes()
    (directory / PAGE_FILE).unlink()
    code, said, _ = invoke("report", directory)
    assert (code, said.strip()) == (0, f"Written to {directory / PAGE_FILE}")
    assert (directory / PAGE_FILE).read_bytes() == made
    elsewhere = tmp_path / "page.html"
    code, said, _ = invoke("report", directory, "--output", elsewhere, "--json")
    assert code == 0
    assert json.loads(said)["page"] == str(elsewhere)
    assert elsewhere.read_bytes() == made


def test_report_of_nothing_is_one_message(tmp_path: Path) -> None:
    code, said, complaint = invoke("report", tmp_path)
    assert (code, said) == (1, "")
    assert "is not there: give the directory of a finished run" in complaint
    assert "Traceback" not in complaint


def test_without_the_extra_a_run_is_finished_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / PAGE_FILE).write_text("of another run")
    monkeypatch.setattr(report_page, "find_spec", lambda _name: None)
    [note] = write_report_files(tmp_path, sample_document())
    assert note.endswith(f"jinja2: pip install 'ercsvd-deploy[report]', then ercsvd report {tmp_path}")
    assert len(note.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == REPORT_FILES - {PAGE_FILE}
    code, _, complaint = invoke("report", tmp_path)
    assert code == 1
    assert "pip install 'ercsvd-deploy[report]'" in complaint


def test_what_only_the_page_cannot_show_does_not_fail_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> str:
        raise ValueError("too strange to draw")

    monkeypatch.setattr(report_files, "make_page", fail)
    [note] = write_report_files(tmp_path, sample_document())
    assert "too strange to draw" in note
    assert json.loads((tmp_path / REPORT_FILE).read_text()) == sample_report()
    assert not (tmp_path / PAGE_FILE).exists()


def test_names_that_are_no_characters_are_written_all_the_same(tmp_path: Path) -> None:
    undecodable = "text-\udcff.txt"
    report = sample_document()
    report.warnings = [undecodable]
    report.original = replace(report.original, perplexity={undecodable: 3.0})
    report.compressed = replace(report.compressed, perplexity={undecodable: 3.0})
    assert write_report_files(tmp_path, report, tmp_path / undecodable) == []
    assert load_report(tmp_path).warnings == ["text-?.txt"]
    assert "text-?.txt" in (tmp_path / PAGE_FILE).read_text(encoding="utf-8")
    assert "text-?.txt" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_core_of_the_page_needs_no_pyplot() -> None:
    """Its global state, and a window system, are none of our business."""
    import subprocess

    code = (
        "import sys; from tests.reporting.sample_reports import sample_document;"
        "from ercsvd_deploy.pipelines.reporting.html.plots import draw_plots; draw_plots(sample_document());"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
