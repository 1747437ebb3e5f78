"""The closing line of a run: how many cases, how they ended."""

COUNTS = ("cases", "refused", "findings")


def pytest_terminal_summary(terminalreporter):
    """Add up what the tests tell, of all processes."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    found = [dict(report.user_properties) for report in reports]
    sums = {name: sum(one.get(name, 0) for one in found) for name in COUNTS}
    if sums["cases"]:
        harmless = sums["cases"] - sums["refused"] - sums["findings"]
        terminalreporter.write_line(
            f"fuzz: {sums['cases']:,} damaged files read: {sums['refused']:,} refused in one line, "
            f"{harmless:,} harmless, {sums['findings']:,} findings"
        )
