"""The benchmark of flows' samplers, really run on tiny directories of the true architectures."""

from pathlib import Path

from tiny import tiny_flux, tiny_sd3

from benchmarks.throughput import flows
from seppo_fast.models import open_model
from seppo_fast.models.published import published_model


def test_flows_of_true_architecture_are_measured(tmp_path: Path) -> None:
    """On the CPU nothing is captured, so both ways draw the same."""
    models = {"sd3": open_model(str(tiny_sd3(tmp_path / "sd3"))), "flux": open_model(str(tiny_flux(tmp_path / "flux")))}
    kept: list[dict] = []
    flows.measure("cpu", kept.append, 60.0, [("sd3", 2, 2), ("flux", 1, 2)], models, flows.Network(3.5, 16))
    rows = kept[-1]["rows"]
    assert [(row["network"], row["difference"]) for row in rows] == [("sd3", 0.0), ("flux", 0.0)]
    assert all(row["captured_images_per_s"] > 0 < row["plain_images_per_s"] for row in rows)
    assert all(published_model(name) is not None for name in flows.NETWORKS) and {point[0] for point in flows.POINTS} <= {
        *flows.NETWORKS}
