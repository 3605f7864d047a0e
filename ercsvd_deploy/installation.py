"""How others install this package: from an index once it is published there, until then from its wheel."""

from __future__ import annotations

from ercsvd_deploy import __version__

# Set true with the first release that a package index has.
IS_PUBLISHED = False
NAME = "ercsvd-deploy"
WHEEL = f"ercsvd_deploy-{__version__}-py3-none-any.whl"
# Where the wheel comes from, for whoever has the sources and not the wheel.
MAKE_WHEEL = "python -m pip wheel --no-deps --wheel-dir . PATH-OF-THE-SOURCES"


def install_command(*extras: str, beside: str = "") -> str:
    """Return the command that installs this package.

    Args:
        extras: Its optional parts, "compress" say.
        beside: Requirement of another package that is to be installed with it.
    """
    wanted = f"[{','.join(extras)}]" if extras else ""
    package = f"'{NAME}{wanted}'" if IS_PUBLISHED else f"'./{WHEEL}{wanted}'"
    words = ["pip install", *([f"'{beside}'"] if beside else []), package]
    return " ".join(words)


def where_from() -> str | None:
    """Return how one gets what `install_command` names; None if an index has it."""
    return None if IS_PUBLISHED else f"{NAME} is in no package index yet: make its wheel with  {MAKE_WHEEL}"
