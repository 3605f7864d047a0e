"""The entry point of the command `ercsvd`: the command line, if its libraries are installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; with only the base install (vLLM's plugin), print which extra to install."""
    try:
        from ercsvd_deploy.pipelines.cli.app import main as run
    except ModuleNotFoundError as error:
        library = error.name or "a library"
        if library.partition(".")[0] == "ercsvd_deploy":  # a defect of this package, not of the install
            raise
        sys.stderr.write(f"error: {library} is not installed: pip install 'ercsvd-deploy[compress]'\n")
        raise SystemExit(1) from None
    run()
