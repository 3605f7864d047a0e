"""The command line, for `python -m ercsvd_deploy` where the command `ercsvd` is not on the path."""

from ercsvd_deploy.pipelines.cli.entry_point import main

if __name__ == "__main__":
    main()
