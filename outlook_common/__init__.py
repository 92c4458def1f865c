"""Shared by the twins: configurations, window geometry, weights, images. Imports no framework."""

from outlook_common.config import VOLO_VARIANTS, OutlookAttentionConfig, VOLOConfig
from outlook_common.geometry import WindowGrid, window_grid

__all__ = ["VOLO_VARIANTS", "OutlookAttentionConfig", "VOLOConfig", "WindowGrid", "window_grid"]
