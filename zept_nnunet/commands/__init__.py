"""The subcommands of `zept`, one module each with `register(subparsers)`."""
