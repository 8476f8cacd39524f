"""The pages' figures are those of the result files; their links lead somewhere."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from benchmarks.config_keys import keys
from benchmarks.loss_summary import ratios, targets
from benchmarks.readme import BENCHMARKS, CONFIGS, PAGES, README, RESULTS, filled, loss, quickstart
from seppo_fast import __version__
from seppo_fast.config import Seppo


def test_the_tables_are_what_the_result_files_give() -> None:
    """Out of date? `make readme`."""
    assert quickstart() in README.read_text()
    assert loss() in BENCHMARKS.read_text()
    for page in PAGES:
        assert filled(page.read_text()) == page.read_text(), page


def test_the_front_page_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= 180
    assert len(README.read_bytes()) <= 12 * 1024


ROOT = README.parent


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("seppo_fast/*/README.md")],
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


def loss_result() -> dict:
    """What benchmarks/loss.py writes, of 2 pairs in bf16: native 10 us, eager 61, compile 25, copy 8."""
    label = {"what": "forward_backward", "shape": "sd15", "pairs": 2, "dtype": "bf16", "floor_bytes": 524_288}
    rows = [label | {"implementation": name, "median_us": us, "p10_us": us, "calls": 9, "peak_gradients": 1.0}
            for name, us in (("eager", 61.0), ("compile", 25.0), ("liger_style", 20.0), ("native", 10.0), ("copy", 8.0))]
    rows[0]["peak_gradients"] = 10.0
    del rows[-1]["peak_gradients"]
    found = ratios(rows)
    return {"machine": {"cpu": "Some CPU", "cores": 4, "threads": 2, "load_average_at_start": 0.1, "load_average_at_end": 1.9},
            "versions": {"torch": "2.99"}, "commit": "abc123", "settings": {"rotate_mb": 960}, "rows": rows, "ratios": found,
            "targets": targets(found, "cpu")}


def test_the_loss_block_of_a_machine_that_measured_nothing_says_so(tmp_path) -> None:
    assert loss(tmp_path).startswith("On the CPU: not measured yet")


def test_the_loss_block_has_the_measured_figures(tmp_path) -> None:
    result = loss_result()
    (tmp_path / "loss_cpu.json").write_text(json.dumps(result))
    text = loss(tmp_path)
    assert "| SD-1.5, 512x512: 2 | 10 | 6.1x | 2.5x | 1.25 |" in text.splitlines()
    assert "in gradient tensors: fused loss 1.00, eager 10.00, compile 1.00." in text
    assert "- at least 5x faster than eager, 2 to 64 pairs: not measured to the end, worst 6.10 at 2 pairs bf16" in text
    assert "Some CPU, 2 of 4 cores, torch 2.99, commit `abc123`, load average 0.1 to 1.9" in text
    slower = copy.deepcopy(result)
    slower["ratios"][0]["eager_over_fused"] = 4.9
    slower["targets"] = targets(slower["ratios"], "cpu")
    (tmp_path / "loss_cpu.json").write_text(json.dumps(slower))
    assert "2 to 64 pairs: **missed**, worst 4.90 at 2 pairs bf16" in loss(tmp_path)


def test_the_loss_block_has_a_table_for_each_gpu(tmp_path) -> None:
    suite = {"machine": {"gpu": "Some GPU", "torch": "2.99", "driver": "1.2"}, "commit": "abc123",
             "baselines": {"rows": [{"shape": "sd15", "pairs": 8, "dtype": "bf16", "us":
                                     {"eager": 700.0, "compile": 150.0, "liger_style": 140.0, "native": 70.0, "copy": 9.0}}]},
             "bandwidth": {"rows": [{"shape": "sd15", "pairs": 1024, "dtype": "bf16", "native_us": 95.0, "triton_us": 90.0,
                                     "copy_us": 93.0}]},
             "memory": {"rows": [{"shape": "sd15", "pairs": 256, "dtype": "bf16", "implementation": name, "gradients": value}
                                 for name, value in (("eager", 10.0), ("native", 1.0), ("triton", 1.5))]}}
    (tmp_path / "gpu_suite_some.json").write_text(json.dumps(suite))
    lines = loss(tmp_path).splitlines()
    assert any("Some GPU" in line for line in lines)
    assert "Peak memory beyond the inputs, in gradient tensors: fused loss 1.00, eager 10.00." in lines
    for row in ("8 | 70 | 10.0x | 2.1x | - |", "1024 | - | - | - | 1.02 |"):
        assert f"| SD-1.5, 512x512: {row}" in lines
    assert "- at least 8x faster than eager, 1 to 8 pairs: not measured to the end, worst 10.00 at 8 pairs bf16" in lines


@pytest.mark.parametrize("partial", ["baselines", "bandwidth", "memory"])
def test_a_gpu_suite_cut_short_still_makes_a_block(tmp_path, partial) -> None:
    (tmp_path / "gpu_suite.json").write_text(json.dumps({"machine": {"gpu": "Some GPU", "torch": "2.99", "driver": ""},
                                                         "commit": "abc", partial: {"outcome": "stopped after 9 s"}}))
    assert loss(tmp_path).count("not measured to the end") == 4


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
