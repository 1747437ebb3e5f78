"""Files on disk and elsewhere: `files` (atomic), `archive`, `web`, `stores`, `registry`."""
