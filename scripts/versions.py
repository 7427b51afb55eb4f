"""Write docs/versions.md from the table of tested versions."""

from pathlib import Path

from peftcli.doctor.tested import versions_page

PAGE = Path(__file__).parent.parent / "docs" / "versions.md"

if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(versions_page(), encoding="utf-8")
    print(PAGE)
