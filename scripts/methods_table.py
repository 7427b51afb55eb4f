"""Print the tables of docs/methods.md, between its markers; with --write, put them there."""

import sys
from pathlib import Path

from peftcli.methods.registry import markdown

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- methods -->\n", "<!-- /methods -->"


def main() -> None:
    """Print the tables, or write them into the page."""
    if "--write" not in sys.argv[1:]:
        sys.stdout.write(markdown())
        return
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page with the tables of today between its markers."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE}: no section between {BEGIN.strip()} and {END}")
    return f"{before}{BEGIN}{markdown()}{END}{after}"


if __name__ == "__main__":
    main()
