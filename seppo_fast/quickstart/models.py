"""The models that the quickstart can make, by what `--model` calls them."""

from seppo_fast.quickstart import base, flow
from seppo_fast.quickstart.base import Recipe
from seppo_fast.quickstart.kind import Kind

KINDS = {
    "unet": Kind("tokenizer, VAE, text encoder and UNet", Recipe(), base.make_base, "quickstart.json"),
    "flow": Kind("tokenizers, VAE, text encoders and transformer", flow.RECIPE, flow.make_base, "quickstart_flow.json"),
}
