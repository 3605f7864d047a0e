"""Plans configs, and tells what each took: `python -m tests.planning.plan_configs RECIPE`.

Every line of standard input is {"config": the config.json of a model, "sizes": tensor parallel sizes}; the
answer is a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Serve until stdin ends."""
    from ercsvd_deploy.pipelines.planning.machine import Machine
    from ercsvd_deploy.pipelines.planning.plan import make_plan
    from ercsvd_deploy.recipe.load import load_recipe
    from tests.peak_memory import peak_bytes

    recipe = Path(sys.argv[1])
    model = Path(load_recipe(recipe).model.path)
    for line in sys.stdin:
        asked = json.loads(line)
        (model / "config.json").write_text(json.dumps(asked["config"]))
        loaded = load_recipe(recipe, [f"serving.tensor_parallel_sizes={asked['sizes']}"])
        started = time.process_time()
        try:
            plan = make_plan(loaded, machine=Machine(None, None, None))  # large enough
        except ValueError as error:
            print(json.dumps({"refused": str(error)}), flush=True)  # noqa: T201 - the protocol
            continue
        seconds = time.process_time() - started
        assert plan.architecture is not None
        break_even = {
            (layer.index, layer.local_name(linear)): float(linear.break_even_rank)
            for layer in plan.architecture.layers
            for linear in layer.linears
        }
        ranks = {
            (break_even[layer.index, name], rank)
            for candidate in plan.candidates
            for layer in candidate.layers
            for name, rank in layer.ranks.items()
            if rank is not None
        }
        answer = {
            "refused": None,
            "seconds": seconds,
            "peak_bytes": peak_bytes(),
            "parameters": plan.model_parameters,
            "linear_parameters": plan.linear_parameters,
            "kept_parameters": [candidate.linear_parameters for candidate in plan.candidates],
            "ranks": sorted(ranks),  # each with its matrix's break-even rank before it
            "problems": plan.estimate.problems,
            "warnings": plan.warnings,
        }
        print(json.dumps(answer), flush=True)  # noqa: T201 - the protocol


if __name__ == "__main__":
    main()
