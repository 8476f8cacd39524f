"""Makes the tables of the README pages from benchmarks/results/ and config.py: `python -m benchmarks.readme [--check]`."""

import argparse
import sys

from benchmarks.readme.pages import PAGES, filled


def main(argv: list[str] | None = None) -> int:
    """Write the tables into the pages. With --check change nothing; exit status 1 when a page is out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 when a page is out of date")
    check = parser.parse_args(argv).check
    for page in PAGES:
        text = page.read_text()
        fresh = filled(text)
        if check and fresh != text:
            return 1
        page.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
