"""Hub ids, against a small server that speaks as much of the hub's protocol as a download needs."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import free_port
from hub_server import handler
from tiny import tiny_adapter

from seppo_fast.errors import UserError
from seppo_fast.models.hub import check_sets, needed
from seppo_fast.models.labels import KEYS

ROOT = Path(__file__).parents[2]


SCRIPT = """
import sys
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
for line in sys.stdin:
    try:
        path, _, adapter = line.strip().partition("+")
        model = open_model(path, motion_adapter=adapter or None)
        model.load_vae("cpu")
        model.load_text("cpu")(["a cat"])
        print("ANSWER PATH", model.path, flush=True)
    except UserError as error:
        print("ANSWER REFUSED", " ".join(str(error).split()), flush=True)
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Iterator[tuple[int, Callable[[str], list[str]]]]:
    """A port, and `ask(name)`: what a process says of a model's name, for which the hub is at that port.

    A process of its own, because the hub's client reads its environment at import; one, because it imports for seconds.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    port, home = free_port(), tmp_path_factory.mktemp("hub")
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "PYTHONPATH": str(ROOT),
                    "HF_HUB_DISABLE_XET": "1"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=home,
                          env=environment) as process:

        def ask(name: str) -> list[str]:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("ANSWER "):
                    return line.removesuffix("\n").split(" ", 2)[1:]
            raise AssertionError(f"the process ended with {process.wait()}")

        yield int(port), ask
        process.stdin.close()


@contextmanager
def serving(port: int, hub: type[BaseHTTPRequestHandler]) -> Iterator[None]:
    """The hub is there."""
    server = ThreadingHTTPServer(("127.0.0.1", port), hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_download_then_offline(own_sd, opened):
    port, ask = opened
    (own_sd / "unet/diffusion_pytorch_model.bin").write_bytes(b"not wanted")
    (own_sd / "v1-5-pruned.ckpt").write_bytes(b"not wanted")
    hub = handler(own_sd)
    hub.protocol_version = "HTTP/1.0"  # no connection outlives the server, so that it is gone when it is shut down
    with serving(port, hub):
        (kind, first), (refused, message) = ask("tiny/sd"), ask("tiny/other")
    assert kind == "PATH", first
    assert refused == "REFUSED" and "tiny/other" in message and "spelling" in message
    assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched
    assert not {"unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt"} & set(hub.fetched)
    for name in hub.fetched:
        assert (Path(first) / name).read_bytes() == (own_sd / name).read_bytes()

    again, (refused, message) = ask("tiny/sd"), ask("tiny/never-seen")
    assert again == ["PATH", first]
    assert refused == "REFUSED" and "tiny/never-seen" in message and "connect" in message


@pytest.mark.slow
def test_a_motion_adapter_from_the_hub(sd_folder, opened, tmp_path):
    port, ask = opened
    adapter = tiny_adapter(tmp_path / "adapter")
    (adapter / "mm_sd_v15.ckpt").write_bytes(b"not wanted")
    hub = handler(adapter, "tiny/motion")
    with serving(port, hub):
        found, refused = ask(f"{sd_folder}+tiny/motion"), ask(f"{sd_folder}+tiny/no")
    assert found == ["PATH", str(sd_folder)]
    assert set(hub.fetched) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert refused[0] == "REFUSED" and "seppo.model.motion_adapter 'tiny/no'" in refused[1]


FILES = [
    "model_index.json", "README.md", "v1-5.ckpt", "unet/config.json", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors.index.json", "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors", "text_encoder_2/model.safetensors.index.fp16.json",
    "text_encoder_2/model.fp16-00001-of-00002.safetensors", "text_encoder_2/model.fp16-00002-of-00002.safetensors",
    "text_encoder_2/model.onnx", "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/nested/vocab.json",
    "tokenizer/chat_template.jinja", "vae/config.json", "vae/diffusion_pytorch_model.bin", "vae_decoder/config.json",
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
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/chat_template.jinja", "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    ])


def test_a_repository_with_a_variant_alone_is_refused_before_anything_is_fetched():
    alone = [name for name in FILES if name != "unet/diffusion_pytorch_model.safetensors" and not name.endswith(".bin")]
    with pytest.raises(UserError, match="owner/name/unet holds weights of the variants 'fp16', 'non_ema' alone: set seppo.model"):
        check_sets("owner/name", alone, INDEX, None, KEYS)
    check_sets("owner/name", alone, INDEX, "fp16", KEYS)
    with pytest.raises(UserError, match="owner/motion holds weights of the variant 'fp16' alone"):
        check_sets("owner/motion", ["diffusion_pytorch_model.fp16.bin", "config.json"], {"": ["diffusers", ""]}, None, KEYS)


SHARDED = ["model_index.json", "README.md", "LICENSE.md", "dev_grid.jpg", "flux1-dev.safetensors", "ae.safetensors",
           "sd3.5_medium.safetensors", "text_encoders/clip_l.safetensors", "text_encoders/t5xxl_fp16.safetensors",
           "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model",
           "tokenizer_2/tokenizer.json", "text_encoder/config.json", "text_encoder/model.safetensors", "vae/config.json",
           "vae/diffusion_pytorch_model.safetensors", "text_encoder_2/config.json", "text_encoder_2/model.safetensors.index.json",
           "text_encoder_2/model-00001-of-00002.safetensors", "text_encoder_2/model-00002-of-00002.safetensors",
           "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json",
           *(f"transformer/diffusion_pytorch_model-0000{part}-of-00003.safetensors" for part in (1, 2, 3))]
FLUX = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5TokenizerFast"]}


def test_of_a_flow_the_pipelines_parts_alone_are_fetched_with_all_their_shards():
    """FLUX.1-dev and SD3.5 Medium hold the same weights again, in other forms."""
    other = ("README.md", "LICENSE.md", "dev_grid.jpg", "flux1", "ae.", "sd3.5", "text_encoders/")
    assert needed(SHARDED, FLUX, None) == sorted(name for name in SHARDED if not name.startswith(other))
    check_sets("owner/name", SHARDED, FLUX, None, KEYS)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2", "text_encoder_3"])
def test_a_variant_of_any_part_of_a_flow_is_told_before_anything_is_fetched(part):
    files = [f"{part}/{name}" for name in ("config.json", "model.safetensors.index.fp16.json",
             "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors")]
    library = "diffusers" if part == "transformer" else "transformers"
    if library == "diffusers":
        files = [name.replace("model.", "diffusion_pytorch_model.") for name in files]
    index = {part: [library, "SomeModel"]}
    with pytest.raises(UserError, match=f"owner/name/{part} holds weights of the variant 'fp16' alone: set seppo.model.variant"):
        check_sets("owner/name", files, index, None, KEYS)
    assert needed(files, index, "fp16") == sorted(["model_index.json", *files])
