"""Self-supervised pretraining by clustering: SwAV and its family, in one suite."""

__version__ = "0.1.0"
