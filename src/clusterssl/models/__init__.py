"""Networks: backbones, heads, and the loader of published weights. Needs torch and torchvision only."""
