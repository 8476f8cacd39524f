"""Hub ids, against a small server that speaks as much of the hub's protocol as a download needs."""

import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from hub_server import handler
from tiny import tiny_adapter

from seppo_fast.errors import UserError
from seppo_fast.models.called import KEYS
from seppo_fast.models.hub import check_sets, needed

ROOT = Path(__file__).parents[2]


SCRIPT = """
import sys
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
for name in sys.argv[1:]:
    try:
        path, _, adapter = name.partition("+")
        model = open_model(path, motion_adapter=adapter or None)
        model.load_vae("cpu")
        model.load_text("cpu")(["a cat"])
        print("PATH", model.path)
    except UserError as error:
        print("REFUSED", error)
"""


def open_in_subprocess(endpoint, home, *names):
    """A process of its own, because the hub's client reads its environment at import."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, env=environment,
                          timeout=120, cwd=home)
    assert done.returncode == 0, done.stderr
    return [line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("PATH", "REFUSED"))]


def test_download_then_offline(own_sd, tmp_path):
    (own_sd / "unet/diffusion_pytorch_model.bin").write_bytes(b"not wanted")
    (own_sd / "v1-5-pruned.ckpt").write_bytes(b"not wanted")
    hub = handler(own_sd)
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    (kind, first), (refused, message) = open_in_subprocess(endpoint, tmp_path, "tiny/sd", "tiny/other")
    assert kind == "PATH", first
    assert refused == "REFUSED" and "tiny/other" in message and "spelling" in message
    assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched
    assert not {"unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt"} & set(hub.fetched)
    for name in hub.fetched:
        assert (Path(first) / name).read_bytes() == (own_sd / name).read_bytes()

    server.shutdown()
    server.server_close()
    again, (refused, message) = open_in_subprocess(endpoint, tmp_path, "tiny/sd", "tiny/never-seen")
    assert again == ["PATH", first]
    assert refused == "REFUSED" and "tiny/never-seen" in message and "connect" in message


def test_a_motion_adapter_from_the_hub(sd_folder, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter")
    (adapter / "mm_sd_v15.ckpt").write_bytes(b"not wanted")
    hub = handler(adapter, "tiny/motion")
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    found = open_in_subprocess(endpoint, tmp_path, f"{sd_folder}+tiny/motion", f"{sd_folder}+tiny/no")
    server.shutdown()
    server.server_close()
    assert found[0] == ["PATH", str(sd_folder)]
    assert set(hub.fetched) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert found[1][0] == "REFUSED" and "seppo.model.motion_adapter 'tiny/no'" in found[1][1]


FILES = [
    "model_index.json", "README.md", "v1-5.ckpt", "unet/config.json", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors.index.json", "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors", "text_encoder_2/model.safetensors.index.fp16.json",
    "text_encoder_2/model.fp16-00001-of-00002.safetensors", "text_encoder_2/model.fp16-00002-of-00002.safetensors",
    "text_encoder_2/model.onnx", "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/nested/vocab.json",
    "vae/config.json", "vae/diffusion_pytorch_model.bin", "vae_decoder/config.json",
]
INDEX = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
         "vae": ["diffusers", "AutoencoderKL"], "tokenizer": ["transformers", "CLIPTokenizer"],
         "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "image_encoder": [None, None]}


@pytest.mark.parametrize("variant, unet, text", [
    (None, "diffusion_pytorch_model.safetensors",
     ["model.safetensors.index.json", "model-0000{}-of-00002.safetensors"]),
    ("fp16", "diffusion_pytorch_model.fp16.safetensors",
     ["model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"]),
])
def test_one_set_of_weights_each(variant, unet, text):
    assert needed(FILES, INDEX, variant) == sorted([
        "model_index.json", "unet/config.json", f"unet/{unet}", "text_encoder_2/config.json",
        f"text_encoder_2/{text[0]}", *(f"text_encoder_2/{text[1].format(part)}" for part in (1, 2)),
        "tokenizer/vocab.json", "tokenizer/merges.txt", "vae/config.json", "vae/diffusion_pytorch_model.bin",
    ])


def test_a_repository_with_a_variant_alone_is_refused_before_anything_is_fetched():
    alone = [name for name in FILES if name != "unet/diffusion_pytorch_model.safetensors" and not name.endswith(".bin")]
    with pytest.raises(UserError, match="owner/name/unet holds weights of the variants 'fp16', 'non_ema' alone: set seppo.model"):
        check_sets("owner/name", alone, INDEX, None, KEYS)
    check_sets("owner/name", alone, INDEX, "fp16", KEYS)
    with pytest.raises(UserError, match="owner/motion holds weights of the variant 'fp16' alone"):
        check_sets("owner/motion", ["diffusion_pytorch_model.fp16.bin", "config.json"], {"": ["diffusers", ""]}, None, KEYS)
