"""The closing line of a run: how many processes were killed."""


def pytest_terminal_summary(terminalreporter):
    """Add up what the tests tell, of all processes."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    kills = [dict(report.user_properties).get("kills", 0) for report in reports]
    if sum(kills):
        failed = len(terminalreporter.getreports("failed"))
        terminalreporter.write_line(
            f"kill: {sum(kills):,} processes killed in {sum(map(bool, kills))} tests, "
            f"{failed} tests failed"
        )
