"""What steps cost, in order: `config`, `throughput` of a batch, `max_batch`, `probes`."""
