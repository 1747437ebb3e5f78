import logging

from qat.tracking.messages import messages_on_standard_error, say


def test_messages_go_to_standard_error_inside_the_block(capsys, caplog):
    """Each once and as it is; outside, the program's own logging decides."""
    with caplog.at_level(logging.INFO, logger="qat"):
        with messages_on_standard_error():
            say("red at 100%s")
        assert capsys.readouterr().err == "red at 100%s\n"
        say("outside")
    assert caplog.messages == ["outside"]
    assert capsys.readouterr().err == ""
    assert not logging.getLogger("qat").handlers
