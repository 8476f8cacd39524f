"""The pages' figures are those of the result files; their links lead somewhere."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from benchmarks.readme.config_keys import keys
from benchmarks.readme.pages import BENCHMARKS, CONFIGS, PAGES, README, RESULTS, TABLES, filled
from seppo_fast import __version__
from seppo_fast.config import Seppo


def test_the_tables_are_what_the_result_files_give() -> None:
    """Out of date? `make readme`."""
    assert TABLES["quickstart"]() in README.read_text()
    assert TABLES["loss"]() in BENCHMARKS.read_text()
    for page in PAGES:
        assert filled(page.read_text()) == page.read_text(), page


def test_the_front_page_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= 180
    assert len(README.read_bytes()) <= 12 * 1024


ROOT = README.parent


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("seppo_fast/*/*.md")],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """Of a page, as links write them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_example_of_the_loss_runs() -> None:
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    network = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 8,
               "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    names = {"scheduler": DDPMScheduler(), "prompt_embeds": torch.randn(8, 4, 8)}
    names |= {name: UNet2DConditionModel(**network) for name in ("unet", "ref_unet")}
    exec(re.search(r"## Only the loss\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1], names)
    assert names["unet"].conv_in.weight.grad is not None and names["ref_unet"].conv_in.weight.grad is None


def test_the_quickstart_result_names_its_machine_and_names_no_path_of_it() -> None:
    result = json.loads((RESULTS / "quickstart" / "result.json").read_text())
    assert result["machine"]["cpu"] and result["versions"]["torch"] and result["commit"]
    paths = result["settings"]["config"]["seppo"]
    assert not any(path.startswith("/") for path in (paths["model"]["path"], paths["data"]["source"], paths["output_dir"]))


def keys_of(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its full path, sections apart."""
    for name, field in section.model_fields.items():
        nested = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)
                  and issubclass(kind, BaseModel)]
        yield from keys_of(nested[0], f"{prefix}{name}.") if nested else [(f"{prefix}{name}", field)]


def test_the_page_of_keys_has_every_key_once_and_says_what_it_does() -> None:
    table = keys()
    for path, field in keys_of(Seppo, "seppo."):
        assert table.count(f"| `{path}` |") == 1, path
        assert field.description and "\n" not in field.description, path
        assert len(field.description) < 130 and field.description.endswith("."), path
    assert "| `seppo.sampler.batch_size` | whole number above 0 or `\"auto\"` | `16` |" in table
    assert "| `seppo.model.path` | text, not empty | has to be given |" in table
    assert keys() in CONFIGS.read_text(), "out of date? `make readme`"


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and cited["cff-version"] == "1.2.0" and len(cited["references"]) == 2
