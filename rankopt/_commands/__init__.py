"""The subcommands of `rankopt`, one module per group."""
