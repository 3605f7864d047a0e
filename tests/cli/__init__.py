"""The command line as such; commands are tested in the rooms that they are about."""
