"""What the command `ercsvd` starts: the command line, if what it needs is installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; with the base install alone, which is vLLM's plugin, say what is missing."""
    try:
        from ercsvd_deploy.pipelines.cli.app import main as run
    except ModuleNotFoundError as error:
        missing = error.name or "a library"
        if missing.partition(".")[0] == "ercsvd_deploy":  # a defect of this package, not of the install
            raise
        sys.stderr.write(f"error: {missing} is not installed: pip install 'ercsvd-deploy[compress]'\n")
        raise SystemExit(1) from None
    run()
