"""What steps cost: `config`; `ratios` against plain fine-tuning; `max_batch` by `throughput`.

Order: config, ratios, throughput, max_batch, probes, report.
"""
