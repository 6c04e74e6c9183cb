"""OpenVLA's image preprocessing at evaluation, without tensorflow: what the policy sees of a rendered frame.

OpenVLA evaluates with tensorflow's image operations; these functions give the same bytes on x86-64 (compared in
tests/ppo/test_images.py). They need only numpy, OpenCV and simplejpeg, the resize numba too, so that an environment
process stays small and starts quickly. Shapes: B images, H, W height and width in pixels, 3 channels in the order red,
green, blue.
"""

import ctypes
from functools import lru_cache

import cv2
import numpy as np
import simplejpeg

JPEG_QUALITY = 95
"""Default of tf.io.encode_jpeg, which also halves the chroma's resolution (4:2:0)."""
LANCZOS_RADIUS = 3.0


def jpeg_round_trip(image_HW3: np.ndarray) -> np.ndarray:
    """Encode as tf.io.encode_jpeg does by default, and decode as tf.io.decode_image does.

    The decoder is the reason for simplejpeg: tensorflow asks libjpeg for its fast integer transform, which OpenCV and
    Pillow cannot be told to use (they differ by up to 13 levels).

    Args:
        image_HW3: (H, W, 3) uint8.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: another shape or type.
    """
    _check(image_HW3)
    settings = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]  # OpenCV's default is 4:2:0 too
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image_HW3, cv2.COLOR_RGB2BGR), settings)
    return simplejpeg.decode_jpeg(encoded, fastdct=True, fastupsample=False)


def resize_lanczos3(image_HW3: np.ndarray, size: int) -> np.ndarray:
    """Resize as tf.image.resize(method="lanczos3", antialias=True), then round, clip and convert to uint8.

    Sums in tensorflow's order and precision: rows first, source pixel after source pixel, in float32.

    Args:
        image_HW3: (H, W, 3) uint8.
        size: side of the result in pixels, >= 1.

    Returns:
        (size, size, 3) uint8.

    Raises:
        ValueError: another shape or type, or a size below 1.
    """
    _check(image_HW3)
    if size < 1:
        raise ValueError(f"size {size}: must be at least 1 pixel")
    height, width, _ = image_HW3.shape
    rows = _resample_axis0(image_HW3.reshape(height, -1).astype(np.float32), size)
    columns = cv2.transpose(rows.reshape(size, width, 3))
    resized = _resample_axis0(columns.reshape(width, -1), size)
    rounded = np.clip(np.rint(resized, out=resized), 0.0, 255.0, out=resized).astype(np.uint8)
    return cv2.transpose(rounded.reshape(size, size, 3))


def policy_image(image_HW3: np.ndarray, size: int) -> np.ndarray:
    """What OpenVLA's evaluation shows the policy of an upright frame: JPEG round trip, Lanczos-3, (size, size, 3)."""
    return resize_lanczos3(jpeg_round_trip(image_HW3), size)


def center_crop(images: np.ndarray, area: float = 0.9) -> np.ndarray:
    """Cut out the central part and enlarge it to the old size, as OpenVLA's evaluation does.

    As tf.image.convert_image_dtype to float32, crop_and_resize (bilinear, the crop's outer pixel centres at the outer
    pixel centres of the result), clip to 0..1, and convert_image_dtype back to uint8. The last maps x to the whole
    part of 255.5 x, so values are rounded to the nearest except that the upper half of the range tends upwards.

    Args:
        images: (H, W, 3) or (B, H, W, 3) uint8.
        area: share of the image's area that is kept, in (0, 1]; each side keeps its square root.

    Returns:
        Array of the same shape and type.

    Raises:
        ValueError: another shape or type, or an area outside (0, 1].
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
        raise ValueError(
            f"images {images.shape} {images.dtype}: must be ([batch,] height, width, 3) uint8"
        )
    if not 0.0 < area <= 1.0:
        raise ValueError(f"area {area}: must lie in (0, 1]")
    height, width = images.shape[-3:-1]
    left, right, along_x = _crop_samples(width, area)
    top, bottom, along_y = _crop_samples(height, area)
    unit = images.astype(np.float32) * np.float32(1.0 / 255.0)
    columns = _between(unit.take(left, axis=-2), unit.take(right, axis=-2), along_x[:, None])
    cropped = _between(
        columns.take(top, axis=-3), columns.take(bottom, axis=-3), along_y[:, None, None]
    )
    return (np.clip(cropped, 0.0, 1.0, out=cropped) * np.float32(255.5)).astype(np.uint8)


def _check(image_HW3: np.ndarray) -> None:
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[-1] != 3:
        raise ValueError(
            f"image {image_HW3.shape} {image_HW3.dtype}: must be (height, width, 3) uint8"
        )


def _between(low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
    """`low + (high - low) * share` in float32, written into `high`."""
    high -= low
    high *= share
    high += low
    return high


@lru_cache(maxsize=16)
def _crop_samples(size: int, area: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a centred crop of `size` pixels samples: the two neighbours and the share of the second, (size,) each."""
    one, side = np.float32(1.0), np.sqrt(np.float32(area))
    start = (one - side) / np.float32(2.0)
    last = np.float32(size - 1)
    if size == 1:
        position = np.asarray([np.float32(0.5) * (start + (start + side)) * last])
    else:
        step = ((start + side) - start) * last / last
        position = start * last + np.arange(size, dtype=np.float32) * step
    low, high = np.floor(position), np.ceil(position)
    return (
        low.astype(np.intp),
        np.minimum(high, last).astype(np.intp),
        (position - low).astype(np.float32),
    )


def _resample_axis0(source: np.ndarray, size: int) -> np.ndarray:
    """Resample (n, k) float32 to (size, k) along the first axis."""
    from ppo.envs.images_compiled import add_weighted_rows

    result = np.zeros((size, source.shape[1]), dtype=np.float32)
    add_weighted_rows(source, *_lanczos_taps(len(source), size), result)
    return result


@lru_cache(maxsize=16)
def _lanczos_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Source pixels and weights of each result pixel: (taps, new) intp and float32, in the order of summation.

    Tensorflow's ComputeSpans: the kernel is widened by old / new when shrinking (antialias), cut off at the border
    and normalised. Its arithmetic is float32 throughout. Unused taps have weight 0.
    """
    f32 = np.float32
    inverse = f32(1.0) / (f32(new) / f32(old))
    widening = max(inverse, f32(1.0))
    radius = f32(LANCZOS_RADIUS) * widening
    centre = (np.arange(new, dtype=f32) + f32(0.5)) * inverse
    start = np.clip(np.ceil(centre - radius - f32(0.5)), 0, old - 1).astype(np.intp)
    end = np.clip(np.floor(centre + radius - f32(0.5)), 0, old - 1).astype(np.intp) + 1
    indices = start + np.arange((end - start).max())[:, None]
    position = (indices.astype(f32) + f32(0.5) - centre) * (f32(1.0) / widening)
    weights = np.where(indices < end, _lanczos3(position), f32(0.0))
    total = np.zeros(new, dtype=f32)
    for weight in weights:
        total += weight
    return np.minimum(indices, old - 1), weights * (f32(1.0) / total)


def _lanczos3(position: np.ndarray) -> np.ndarray:
    """The Lanczos kernel of radius 3 in float32, 1 within 0.001 of its centre as in tensorflow."""
    pi, radius, x = np.float32(np.pi), np.float32(LANCZOS_RADIUS), np.abs(position)
    near = np.maximum(x, np.float32(1e-3))
    kernel = radius * _sine(pi * near) * _sine(pi * near / radius) / (pi * pi * near * near)
    return np.where(
        x > radius, np.float32(0.0), np.where(x <= np.float32(1e-3), np.float32(1.0), kernel)
    )


def _sine(angles: np.ndarray) -> np.ndarray:
    """The C library's float32 sine, which tensorflow calls; numpy's differs in the last bit, enough to be seen."""
    sine = ctypes.CDLL("libm.so.6").sinf
    sine.restype, sine.argtypes = ctypes.c_float, [ctypes.c_float]
    values = np.fromiter(
        (sine(angle) for angle in angles.flat), dtype=np.float32, count=angles.size
    )
    return values.reshape(angles.shape)
