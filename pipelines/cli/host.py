"""`ercsvd bench-host`: measure this machine once, so that `ercsvd plan` can tell times."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ercsvd_deploy.pipelines.cli.failures import command
from ercsvd_deploy.pipelines.cli.messages import print_json, result_console
from ercsvd_deploy.pipelines.cli.options import AsJson, Debug, Device


def bench_host(
    directory: Annotated[
        Path | None, typer.Option(help="On the disk to measure; default the working directory.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure this machine's speed, in seconds; `plan` then tells times."""
    with command(debug=debug):
        from rich.table import Table

        from ercsvd_deploy.pipelines.inputs.model import default_device, find_device
        from ercsvd_deploy.pipelines.planning import host_speed

        used = find_device(device) or default_device()
        speed = host_speed.bench_host(used, directory)
        found = {"host": host_speed.host_key(used), **asdict(speed), "kept_in": str(host_speed.cache_path())}
        if as_json:
            print_json(found)
            return
        table = Table(title=str(found["host"]), title_justify="left")
        table.add_column("what")
        table.add_column("speed", justify="right")
        table.add_row("matrix products of layers", f"{speed.matmul_flops / 1e9:,.0f} GFLOP/s")
        table.add_row("matrix products, float32", f"{speed.single_flops / 1e9:,.0f} GFLOP/s")
        table.add_row("matrix products, float64", f"{speed.double_flops / 1e9:,.0f} GFLOP/s")
        for side, seconds in speed.eigh_seconds.items():
            table.add_row(f"eigendecomposition, {side} x {side}, float64", f"{seconds:.3f} s")
        table.add_row("memory, read and written", f"{speed.copy_bytes / 1e9:,.1f} GB/s")
        table.add_row("a small operation", f"{speed.small_operation * 1e6:,.1f} us")
        table.add_row("disk, written", f"{speed.disk_write_bytes / 1e9:,.2f} GB/s")
        table.add_row("disk, read", f"{speed.disk_read_bytes / 1e9:,.2f} GB/s")
        result_console().print(table)
        result_console().print(f"kept in {found['kept_in']}", highlight=False, markup=False)
