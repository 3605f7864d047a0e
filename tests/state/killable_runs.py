"""Runs a recipe in child processes that may be killed: `python -m tests.state.killable_runs RECIPE OUTPUT`.

Libraries are imported once; every line on stdin forks a child that runs the recipe, and the parent answers
with its process id, then with its wait status. No tensor is made before a fork, so no thread pool is cut.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401 - imported once instead of in every child

from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe


def main() -> None:
    """Serve until stdin ends."""
    recipe, output = Path(sys.argv[1]), Path(sys.argv[2])
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run_recipe(load_recipe(recipe, output=output))
            except BaseException as error:  # noqa: BLE001 - the parent only sees a status
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
            os._exit(0)
        print(child, flush=True)  # noqa: T201 - the protocol
        _, status = os.waitpid(child, 0)
        print(status, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
