"""The README's figures are those of the result files."""

import json

from benchmarks.readme import README, RESULTS, filled, quickstart


def test_the_tables_are_what_the_result_files_give() -> None:
    """Out of date? `make readme`."""
    text = README.read_text()
    assert quickstart() in text
    assert filled(text) == text


def test_the_quickstart_result_names_its_machine_and_names_no_path_of_it() -> None:
    result = json.loads((RESULTS / "quickstart" / "result.json").read_text())
    assert result["machine"]["cpu"] and result["versions"]["torch"] and result["commit"]
    paths = result["settings"]["config"]["seppo"]
    assert not any(path.startswith("/") for path in (paths["model"]["path"], paths["data"]["source"], paths["output_dir"]))
