"""Commands: `commands` says what each takes and calls, `command` runs one."""
