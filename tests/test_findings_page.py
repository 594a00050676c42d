"""The page of findings is that of the code."""

import re

from dynamics.findings import CATALOGUE
from tests.findings_page import PAGE, findings_page


def test_it_is_up_to_date():
    assert PAGE.read_text() == findings_page(), "run python -m tests.findings_page"


def test_every_finding_is_on_it():
    page = PAGE.read_text()
    assert all(f"### {code}: {title}\n\n**{severity}**\n" in page for code, (severity, title) in CATALOGUE.items())
    assert set(re.findall(r"OD\d{3}", page)) >= set(CATALOGUE)
