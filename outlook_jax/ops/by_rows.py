"""Outlook attention where devices share the rows of the map: each sends the borders of its part, and no more."""

from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float

from outlook_common.geometry import WindowGrid, window_grid
from outlook_jax.ops.composite.sums import mix, weights


def by_rows(
    value: Float[Array, "B H W N D"],
    logits: Float[Array, "B h w N KK KK"],
    dropout_mask: Float[Array, "B h w N KK KK"] | None,
    grid: WindowGrid,
    axis_name: str,
) -> Float[Array, "B H W N D"]:
    """Return this device's rows of outlook attention over the map that all devices along an axis share.

    The windows of a device reach P rows into the part above and K - S - P into that below. It takes these rows of the
    value, and gives their owners what its windows add to them; probabilities stay where they are.

    Args:
        value: this device's rows, inside `jax.shard_map`.
        logits: of its windows.
        dropout_mask: likewise.
        grid: of this device's rows.
        axis_name: of the mesh; its first device has the topmost rows.

    Raises:
        ValueError: the stride does not divide the rows of a device, or a border is higher than the part beside it.
    """
    (H, W), K, S, P = grid.map_size, grid.kernel_size[0], grid.stride[0], grid.padding[0]
    above, below = P, max(0, K - S - P)
    if H % S:
        raise ValueError(f"each device has {H} rows, which the stride {S} does not divide: {S * -(-H // S)} would do")
    if max(above, below) > H:
        raise ValueError(f"windows reach {max(above, below)} rows beyond the {H} rows of a device; take fewer devices")
    # Whole windows of zero weight are added above and below, so that the longer map is one like any other.
    before, after = -(-above // S), -(-below // S)
    top, bottom = S * before, S * after

    parts = [
        _zeros(value, top - above),
        _from(value[:, H - above :], axis_name, +1),
        value,
        _from(value[:, :below], axis_name, -1),
        _zeros(value, bottom - below),
    ]
    own = weights(logits, dropout_mask, value.dtype)
    own = jnp.pad(own, ((0, 0),) * 4 + ((before, after), (0, 0)))
    longer = window_grid((top + H + bottom, W), grid.kernel_size, grid.stride, grid.padding)
    mixed = mix(own, jnp.concatenate(parts, axis=1), longer)

    out, end = mixed[:, top : top + H], top + H
    out = out.at[:, H - above :].add(_from(mixed[:, top - above : top], axis_name, -1))
    return out.at[:, :below].add(_from(mixed[:, end : end + below], axis_name, +1))


def _from(rows: Array, axis_name: str, step: int) -> Array:
    """Return the rows of the device that is `step` (1 or -1) before this one; zeros where there is none."""
    if not rows.shape[1]:
        return rows
    devices = lax.axis_size(axis_name)
    pairs = [(i, i + step) for i in range(devices) if 0 <= i + step < devices]
    received: Array = lax.ppermute(rows, axis_name, pairs)  # type: ignore[no-untyped-call]
    return received


def _zeros(value: Array, rows: int) -> Array:
    return jnp.zeros_like(value[:, :rows])
