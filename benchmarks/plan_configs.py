"""What a plan of each of many models takes: seconds and memory, from the config.json files of a folder.

    .venv/bin/python benchmarks/plan_configs.py FOLDER

Every file of the folder is the config.json of a model. Libraries are imported once; each plan then runs in a
process of its own, whose highest memory counts. Prints a table, and fails if a plan takes more than it may.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import transformers.modeling_utils  # noqa: F401 - imported once instead of in every child
import yaml

from ercsvd_deploy.models.architecture import ArchitectureError
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.recipe.load import load_recipe

MOST_BYTES, MOST_SECONDS = 1_500_000_000, 20
TEXT = Path("examples/text/calibration.txt")


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


def plan(config: Path) -> str:
    """Plan one config; return what came of it in a few words."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        shutil.copyfile(config, model / "config.json")
        (model / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(model)))
        try:
            made = make_plan(load_recipe(model / "recipe.yaml"))
        except ArchitectureError as error:
            return str(error).replace(f"{folder}: ", "").replace(folder, "").split(";")[0][:110]
        except ValueError as error:  # the recipe and the model do not go together
            return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        return f"{made.model_parameters / 1e9:.2f} G parameters"


def main() -> None:
    """Plan every config of a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    too_much = 0
    for config in sorted(parser.parse_args().folder.glob("*.json")):
        started = time.perf_counter()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            said = plan(config)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            seconds, spent = time.perf_counter() - started, time.process_time()
            row = f"{config.stem:52} {seconds:6.1f} s ({spent:5.1f} of a core) {peak / 1e9:5.2f} GB  {said}"
            os.write(1, f"{row}\n".encode())
            os._exit(peak > MOST_BYTES or spent > MOST_SECONDS)
        _, status = os.waitpid(child, 0)
        too_much += status != 0
    print(f"{too_much} plans took more than {MOST_BYTES / 1e9} GB or {MOST_SECONDS} s")
    sys.exit(bool(too_much))


if __name__ == "__main__":
    main()
