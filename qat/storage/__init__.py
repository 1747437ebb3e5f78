"""Files on disk and elsewhere: `files`, `receipt`, `archive`, `download`, `stores`, `registry`."""
