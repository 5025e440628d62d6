"""The tables in docs/families.md are the code's."""

from pathlib import Path

from clear_dit.families.markdown import families_tables
from clear_dit.families.table import all_families

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_pages_tables_are_the_codes():
    _, _, rest = PAGE.read_text().partition("<!-- begin tables -->\n")
    tables, end, _ = rest.partition("<!-- end tables -->")
    assert end
    assert tables == families_tables(), "run: python -m clear_dit.families.markdown"
    rows = [line for line in tables.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 * (2 + len(all_families()))
