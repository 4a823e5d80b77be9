"""What an exported network says of itself: the model card, and the configuration of a Hugging Face Hub folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterssl.models.exported import Exported

_CARD = """---
tags:
- self-supervised-learning
- image-feature-extraction
pipeline_tag: image-feature-extraction
{library}---

# {name}

{arch} pretrained without labels, exported by clusterssl.

| | |
|---|---|
{facts}

## Use

{use}
{results}
## Limits

The features reflect the images the network was pretrained on, including their biases. What you may do with the weights
is for whoever trained them to say; this card states no licence.
"""


def model_card(exported: Exported, *, library: str, use: str, heads: bool = False) -> str:
    """Text of the card in Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        exported: the network.
        library: that loads the weights, "" if none does by itself.
        use: how to load them.
        heads: whether heads go along.
    """
    height, width = exported.image_size
    rows = {
        "architecture": f"{exported.arch}, {exported.stem} stem{', with heads' if heads else ', without classifier'}",
        "features": f"{exported.backbone.feature_dim} numbers an image",
        "parameters of the backbone": f"{sum(p.numel() for p in exported.backbone.parameters()):,}",
        "images": f"RGB, {height} x {width} pixels, scaled to 0..1, then normalised",
        "mean": ", ".join(map(str, exported.mean)),
        "standard deviation": ", ".join(map(str, exported.std)),
        "weights from": exported.source or "unknown",
    }
    evaluated = "\n## Evaluations\n\n" + "\n".join(f"- {line}" for line in exported.results) + "\n"
    return _CARD.format(
        library=f"library_name: {library}\n" if library else "",
        name=exported.name,
        arch=exported.arch,
        facts="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        use=f"```python\nmodel = {use}\n```" if use else "`clusterssl.hub.backbone(FILE)` builds the network.",
        results=evaluated if exported.results else "",
    )


def hub_config(exported: Exported, timm_name: str) -> dict[str, Any]:
    """Content of config.json; timm's where it has such a network."""
    height, width = exported.image_size
    shared = {"num_classes": 0, "num_features": exported.backbone.feature_dim}
    pixels = {"input_size": [3, height, width], "mean": list(exported.mean), "std": list(exported.std)}
    if not timm_name:
        return {"architecture": exported.arch, "stem": exported.stem, **shared, **pixels}
    vit = timm_name.startswith("vit")
    return {
        "architecture": timm_name,
        **shared,
        "pretrained_cfg": {
            "tag": "clusterssl", "custom_load": False, **pixels, "fixed_input_size": vit, "interpolation": "bilinear",
            "crop_pct": 0.875, "crop_mode": "center", "num_classes": 0, "pool_size": [7, 7],
            "first_conv": "patch_embed.proj" if vit else "conv1", "classifier": "head" if vit else "fc",
        },
    }  # fmt: skip
