"""Commands: flags as a dataclass, one call into `pipelines`, a line of JSON; see `command`."""
