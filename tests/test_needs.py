"""A missing program is a skip with a reason at home, and a failure where SLA_REF_REQUIRE_TOOLS=1."""

import needs
import pytest
from needs import REQUIRED, need_program


def test_found_program_is_returned():
    assert need_program("a shell script", "no-such-program", "sh").endswith("sh")


def test_missing_program_skips_with_a_reason(monkeypatch):
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="inductor needs no-such-program or nor-this-one"):
        need_program("inductor", "no-such-program", "nor-this-one")


def test_missing_program_fails_where_tools_are_required(monkeypatch):
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="needs no-such-program"):
        need_program("inductor", "no-such-program")


def test_missing_site_skips_or_fails_likewise(monkeypatch, tmp_path):
    monkeypatch.setattr(needs, "SITE", tmp_path)
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="make docs"):
        needs.need_site()
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="make docs"):
        needs.need_site()
