"""Subcommands of the `kodalle` command, one file each."""
