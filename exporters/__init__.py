"""Formats a compressed model is served in, one package each. Imported as `ercsvd_deploy.exporters`."""

if __name__ != "ercsvd_deploy.exporters":
    raise ImportError("import this package as ercsvd_deploy.exporters (pip install -e . makes it importable)")
