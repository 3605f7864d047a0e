"""What a recipe does, in order: plan, run, report, and the command line.

Imported as `ercsvd_deploy.pipelines`; the folder lies at the root of the repository.
"""

if __name__ != "ercsvd_deploy.pipelines":
    raise ImportError("import this package as ercsvd_deploy.pipelines (pip install -e . makes it importable)")
