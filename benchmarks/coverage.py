"""Which of many models can be compressed, and what planning takes: from the config.json files of a folder.

    .venv/bin/python benchmarks/coverage.py FOLDER

Every file of the folder is the config.json of a model. Libraries are imported once; each plan then runs in a
process of its own, whose highest memory counts. Fails if a plan takes more than it may.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers.modeling_utils  # noqa: F401 - imported once instead of in every child
import yaml
from results_file import environment, markdown_table, write_results

from ercsvd_deploy.models.description.architecture import ArchitectureError
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.recipe.load import load_recipe

MOST_BYTES, MOST_SECONDS = 1_500_000_000, 20
TEXT = Path("examples/text/calibration.txt")


@dataclass(frozen=True)
class Row:
    """What came of one config.

    Attributes:
        model: Its file's name.
        model_type: What the config says.
        planned: Parameters of the model in billions; None: refused.
        refused: Why; None: planned.
        seconds: Of a processor.
        peak_bytes: Of memory, libraries included.
        is_out_of_reach: Whether it is quantized already, or needs code that transformers does not have.
    """

    model: str
    model_type: str
    planned: float | None
    refused: str | None
    seconds: float
    peak_bytes: int
    is_out_of_reach: bool


def recipe_for(model: Path) -> dict[str, object]:
    """Return a recipe that asks for all that a plan can compute."""
    return {
        "model": {"path": str(model)},
        "calibration": {
            "dataset": {"text": str(TEXT.absolute())},
            "num_samples": 128,
            "sequence_length": 2048,
        },
        "stages": [
            {"factorize": {"method": "erc_svd", "compression_ratio": 0.2}},
            {"quantize": {"bits": 4, "group_size": 64}},
        ],
        "export": {"path": str(model / "out")},
    }


def plan(config: Path) -> tuple[float | None, str | None]:
    """Plan one config; return its parameters in billions, or why it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        shutil.copyfile(config, model / "config.json")
        (model / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(model)))
        try:
            return make_plan(load_recipe(model / "recipe.yaml")).model_parameters / 1e9, None
        except ArchitectureError as error:
            return None, str(error).replace(f"{folder}: ", "").replace(folder, "the model").splitlines()[0]
        except ValueError as error:  # the recipe and the model do not go together
            return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def row_of(config: Path) -> Row:
    """Plan one config in a process of its own."""
    raw = json.loads(config.read_text())
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before = time.process_time()
        planned, refused = plan(config)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        is_out_of_reach = "quantization_config" in raw or (planned is None and "auto_map" in raw)
        row = Row(
            config.stem,
            str(raw.get("model_type")),
            planned,
            refused,
            time.process_time() - before,
            peak,
            is_out_of_reach,
        )
        os.write(writing, json.dumps(asdict(row)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        row = Row(**json.loads(answer.read()))
    os.waitpid(child, 0)
    return row


def as_text(rows: Sequence[Row]) -> str:
    """Return the table, and how many of those that could be planned are."""
    within_reach = [row for row in rows if not row.is_out_of_reach]
    planned = sum(row.planned is not None for row in within_reach)
    cells = [
        [
            row.model,
            row.model_type,
            f"planned, {row.planned:.2f} G parameters" if row.planned else f"refused: {row.refused}",
            f"{row.seconds:.1f}",
            f"{row.peak_bytes / 1e9:.2f}",
        ]
        for row in rows
    ]
    return (
        "# Which models can be compressed\n\n"
        f"Planned: {planned} of {len(within_reach)} that are neither quantized already nor in need of code "
        f"of their own; {len(rows)} configs in all. Seconds of a processor and GB of memory are those of a "
        "plan of ERC-SVD with int4.\n\n"
        + markdown_table(["config", "model type", "what came of it", "seconds", "GB"], cells)
    )


def main() -> None:
    """Plan every config of a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    rows = [row_of(config) for config in sorted(parser.parse_args().folder.glob("*.json"))]
    made_by = environment(".venv/bin/python benchmarks/coverage.py FOLDER", threads=1)
    write_results("coverage", made_by=made_by, figures=[asdict(row) for row in rows], text=as_text(rows))
    sys.exit(any(row.peak_bytes > MOST_BYTES or row.seconds > MOST_SECONDS for row in rows))


if __name__ == "__main__":
    main()
