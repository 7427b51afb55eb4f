"""Print the methods as the README shows them, between its markers; with --write, put them there."""

import sys
from pathlib import Path

from peftcli.methods.listing import markdown

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods -->", "<!-- /methods -->"


def main() -> None:
    """Print the table, or write it into the README."""
    if "--write" not in sys.argv[1:]:
        sys.stdout.write(markdown())
        return
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{README}: no section between {BEGIN} and {END}")
    README.write_text(f"{before}{BEGIN}\n{markdown()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
