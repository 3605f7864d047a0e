"""Plans configs, and tells what each took: `python -m tests.planning.plan_configs RECIPE`.

Every line of standard input is the config.json of a model; the answer is a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Serve until stdin ends."""
    from ercsvd_deploy.models.description.architecture import ArchitectureError
    from ercsvd_deploy.pipelines.planning.plan import make_plan
    from ercsvd_deploy.recipe.load import load_recipe
    from tests.peak_memory import peak_bytes

    recipe = load_recipe(Path(sys.argv[1]))
    config = Path(recipe.model.path) / "config.json"
    for line in sys.stdin:
        config.write_text(line)
        started = time.process_time()
        refused, parameters = None, 0
        try:
            parameters = make_plan(recipe).model_parameters
        except ArchitectureError as error:
            refused = str(error)
        answer = {
            "refused": refused,
            "parameters": parameters,
            "seconds": time.process_time() - started,
            "peak_bytes": peak_bytes(),
        }
        print(json.dumps(answer), flush=True)  # noqa: T201 - the protocol


if __name__ == "__main__":
    main()
