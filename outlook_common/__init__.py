"""Shared by the twins: configurations, window geometry, weights, images. Imports no framework."""

from outlook_common.config import VOLO_VARIANTS, OutlookAttentionConfig, VOLOConfig
from outlook_common.geometry import WindowGrid, window_grid
from outlook_common.version import __version__

__all__ = ["VOLO_VARIANTS", "OutlookAttentionConfig", "VOLOConfig", "WindowGrid", "__version__", "window_grid"]
