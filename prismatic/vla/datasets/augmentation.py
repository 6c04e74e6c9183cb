"""OpenVLA's image augmentation, for whole batches.

Random resized crop, brightness, contrast, saturation, hue, in that order, each clipped to [0, 1]. The random numbers
are drawn with numpy from a generator of the caller's, so they do not depend on tensorflow's threads.
B images, H W image.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from prismatic.vla.datasets.tensorflow_setup import load_tensorflow

CROP_AREA = 0.9
BRIGHTNESS = 0.2
CONTRAST = (0.8, 1.2)
SATURATION = (0.8, 1.2)
HUE = 0.05


@dataclass(frozen=True)
class AugmentationParams:
    """What is done to each of B images.

    Attributes:
        box_B4: crop as (top, left, bottom, right) fractions of the image.
        brightness_B: added to the image in [0, 1].
        contrast_B, saturation_B: factors.
        hue_B: added to the hue in [0, 1).
    """

    box_B4: np.ndarray
    brightness_B: np.ndarray
    contrast_B: np.ndarray
    saturation_B: np.ndarray
    hue_B: np.ndarray


def draw_params(num_images: int, rng: np.random.Generator) -> AugmentationParams:
    """Draw from OpenVLA's ranges (the constants above), B = `num_images`.

    Deviation: OpenVLA (dlimp) draws every number of an image from one seed, so that its crops move along the diagonal
    only and brightness, contrast, ... rise together; here they are independent.
    """
    side = np.sqrt(CROP_AREA)
    corner_B2 = rng.uniform(0.0, 1.0 - side, (num_images, 2))
    return AugmentationParams(
        np.concatenate([corner_B2, corner_B2 + side], axis=1).astype(np.float32),
        rng.uniform(-BRIGHTNESS, BRIGHTNESS, num_images).astype(np.float32),
        rng.uniform(*CONTRAST, num_images).astype(np.float32),
        rng.uniform(*SATURATION, num_images).astype(np.float32),
        rng.uniform(-HUE, HUE, num_images).astype(np.float32),
    )


def augment(images_BHW3: np.ndarray, params: AugmentationParams) -> np.ndarray:
    """Apply `params` to uint8 images; returns uint8 of the same shape.

    Equals tf.image's crop_and_resize and adjust_* applied image by image. Deviation: rounds to uint8 where OpenVLA
    truncates, which would darken every image by half a level.
    """
    out = _augment_function()(
        images_BHW3,
        params.box_B4,
        params.brightness_B,
        params.contrast_B,
        params.saturation_B,
        params.hue_B,
    )
    return out.numpy()


@cache
def _augment_function() -> Any:
    tf = load_tensorflow()

    def run(
        images: Any, box: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any
    ) -> Any:
        per_image = (-1, 1, 1, 1)
        size = tf.shape(images)[1:3]
        x = tf.cast(images, tf.float32) / 255.0
        x = tf.clip_by_value(
            tf.image.crop_and_resize(x, box, tf.range(tf.shape(x)[0]), size), 0.0, 1.0
        )
        x = tf.clip_by_value(x + tf.reshape(brightness, per_image), 0.0, 1.0)
        mean = tf.reduce_mean(x, axis=(1, 2), keepdims=True)
        x = tf.clip_by_value((x - mean) * tf.reshape(contrast, per_image) + mean, 0.0, 1.0)
        # Both are changes in HSV, and going to RGB and back in between changes nothing.
        h, s, v = tf.unstack(tf.image.rgb_to_hsv(x), axis=-1)
        s = tf.clip_by_value(s * tf.reshape(saturation, (-1, 1, 1)), 0.0, 1.0)
        h = tf.math.floormod(h + tf.reshape(hue, (-1, 1, 1)), 1.0)
        x = tf.clip_by_value(tf.image.hsv_to_rgb(tf.stack([h, s, v], axis=-1)), 0.0, 1.0)
        return tf.cast(tf.round(x * 255.0), tf.uint8)

    vector = tf.TensorSpec((None,), tf.float32)
    images = tf.TensorSpec((None, None, None, 3), tf.uint8)
    return tf.function(
        run, input_signature=[images, tf.TensorSpec((None, 4), tf.float32), *[vector] * 4]
    )
