"""The models that the video quickstart can make, by what `--model` calls them."""

from seppo_fast.quickstart.kind import Kind
from seppo_fast.quickstart.video import base, flow
from seppo_fast.quickstart.video.base import Recipe

KINDS = {
    "unet": Kind("tokenizer, VAE, text encoder and UNet with motion modules", Recipe(), base.make_base, "quickstart_video.json"),
    "flow": Kind("tokenizer, 3-D VAE, text encoder and transformer", flow.RECIPE, flow.make_base, "quickstart_video_flow.json"),
}
