"""The command that installs this package: from a package index once published, until then from its wheel."""

from __future__ import annotations

from ercsvd_deploy import __version__

# Set to true with the first release on a package index.
IS_PUBLISHED = False
NAME = "ercsvd-deploy"
SERVED_BY = "vllm>=0.29"  # the oldest release that serves the exports, as a requirement
WHEEL = f"ercsvd_deploy-{__version__}-py3-none-any.whl"
# The command that makes the wheel from the sources.
MAKE_WHEEL = "python -m pip wheel --no-deps --wheel-dir . PATH-OF-THE-SOURCES"


def install_command(*extras: str, beside: str = "") -> str:
    """Return the command that installs this package.

    Args:
        extras: Its optional extras, such as "compress".
        beside: Requirement of another package to install with it.
    """
    extras_suffix = f"[{','.join(extras)}]" if extras else ""
    package = f"'{NAME}{extras_suffix}'" if IS_PUBLISHED else f"'./{WHEEL}{extras_suffix}'"
    words = ["pip install", *([f"'{beside}'"] if beside else []), package]
    return " ".join(words)


def where_from() -> str | None:
    """Return instructions to get the wheel that `install_command` names; None if a package index has it."""
    return None if IS_PUBLISHED else f"{NAME} is in no package index yet: make its wheel with  {MAKE_WHEEL}"
