"""Tiny pipelines: shared ones to read from, and copies to damage."""

import shutil

import pytest
from tiny import tiny_adapter, tiny_animatediff, tiny_flux, tiny_pix2pix, tiny_sd, tiny_sd3, tiny_sdxl


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def pix2pix_folder(tmp_path_factory):
    return tiny_pix2pix(tmp_path_factory.mktemp("models") / "pix2pix")


@pytest.fixture(scope="session")
def xl_pix2pix_folder(tmp_path_factory):
    return tiny_pix2pix(tmp_path_factory.mktemp("models") / "xl_pix2pix", "sdxl")


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory):
    return tiny_adapter(tmp_path_factory.mktemp("models") / "adapter")


@pytest.fixture(scope="session")
def animatediff_folder(tmp_path_factory):
    return tiny_animatediff(tmp_path_factory.mktemp("models") / "animatediff")


@pytest.fixture
def own_sd(sd_folder, tmp_path):
    return shutil.copytree(sd_folder, tmp_path / "sd")


@pytest.fixture
def own_sdxl(sdxl_folder, tmp_path):
    return shutil.copytree(sdxl_folder, tmp_path / "sdxl")


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    return tiny_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    return tiny_flux(tmp_path_factory.mktemp("models") / "flux")
