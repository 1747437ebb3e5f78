"""Students in other programs' formats, one module a format; `config` holds the flags."""
