"""`python -m benchmarks.readme [--check]`: the README's tables, generated from benchmarks/results/."""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def main(argv: list[str] | None = None) -> int:
    """Write the tables into README.md, or with --check say whether they are what the result files give (exit status 1: not)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 when the README is out of date")
    check = parser.parse_args(argv).check
    text = README.read_text()
    fresh = filled(text)
    if check:
        return int(fresh != text)
    README.write_text(fresh)
    return 0


def filled(text: str) -> str:
    """`text` with what stands between its `<!-- name -->` and `<!-- /name -->` replaced by the table of that name."""
    for name, table in {"quickstart": quickstart}.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, make=table: found[1] + make() + "\n" + found[2], text)
    return text


def quickstart() -> str:
    """Before and after, from the quickstart's result.json, with its picture."""
    result = json.loads((RESULTS / "quickstart" / "result.json").read_text())
    base, after = result["base"], result["seppo"]
    first, last = result["first_iteration"], result["last_iteration"]
    lines = [
        "![samples of the base model and, from the same noise, after SePPO](benchmarks/results/quickstart/side_by_side.png)",
        "",
        "| | base | SePPO | change |",
        "|---|---|---|---|",
        *(f"| {label} | {base[key]:.1%} | {after[key]:.1%} | {100 * (after[key] - base[key]):+.1f} points |"
          for key, label in (("prompt_accuracy", "prompt accuracy"), ("cleanliness", "cleanliness"))),
        "",
        "| | first iteration | last iteration |",
        "|---|---|---|",
        *(f"| {label} | {first[key]:.2f} | {last[key]:.2f} |"
          for key, label in (("aaf_rate", "AAF rate (share of sign -1, App. B.2)"),
                             ("implicit_acc", "implicit accuracy (share of logit > 0)"))),
        "",
        f"Measured by `make quickstart` with seed {result['settings']['seed']} on {result['machine']['cpu']},"
        f" {result['machine']['cores']} cores, {result['machine']['threads']} thread{'s' * (result['machine']['threads'] > 1)}:"
        f" {result['seconds']['total']:.0f} s in all, base model included, installation apart. Prompt accuracy: share of"
        f" {base['samples']} samples that an independent classifier reads as the prompt's digit. Cleanliness: share of samples as"
        " close to a held-out real digit as 95% of the real digits are.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
