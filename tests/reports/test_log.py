"""The table of the speedrun log."""

from qat.reports.log import records_table


def record(name, cache, **kl):
    fields = ("run", "date", "instance", "steps", "seconds", "tokens_per_second")
    return {
        **dict.fromkeys((*fields, "kd_loss", "perplexity", "bits")),
        **{"name": name, "cache": cache, **kl},
    }


def test_the_least_of_a_cache_is_bold_for_each_kind_of_distance():
    """Bounds and exact distances have columns of their own; older entries lack one of them."""
    table = records_table(
        [
            record("a", "x", kl_nats=0.5, kl_nats_lower=None),
            record("b", "x", kl_nats=0.4, kl_nats_lower=None),
            record("c", "x", kl_nats_lower=0.1),
            record("d", "y", kl_nats=0.9),
        ]
    )
    exact, bound = (table.header.index(name) for name in ("kl_nats", "kl_nats_lower"))
    assert [row[exact] for row in table.rows] == [0.5, "**0.4**", None, "**0.9**"]
    assert [row[bound] for row in table.rows] == [None, None, "**0.1**", None]
