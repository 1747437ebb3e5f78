"""What happened in a run: `record` (its folder), `sinks` (where numbers go), `compare`."""
