"""Image augmentation against tensorflow's own operations, and the background thread."""

import itertools
import threading
import time

import numpy as np
import pytest

from prismatic.vla.datasets.augmentation import AugmentationParams, augment, draw_params
from prismatic.vla.datasets.prefetch import prefetch
from prismatic.vla.datasets.tensorflow_setup import load_tensorflow


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth coloured pictures: noise would hide a crop that is off by a pixel."""
    y, x = np.mgrid[0:24, 0:24] / 24
    planes = [np.stack([x * a, y * (1 - a), (x + y) / 2 * a], -1) for a in (0.2, 0.5, 0.8, 1.0)]
    return (np.stack(planes) * 255).astype(np.uint8)


ORDER = "crop brightness contrast saturation hue"


def one_by_one(
    image: np.ndarray, params: AugmentationParams, i: int, order: str = ORDER
) -> np.ndarray:
    """What OpenVLA's pipeline does to one image, operation by operation, each clipped."""
    tf = load_tensorflow()
    operations = {
        "crop": lambda x: tf.image.crop_and_resize(
            x[None], params.box_B4[i : i + 1], [0], x.shape[:2]
        )[0],
        "brightness": lambda x: tf.image.adjust_brightness(x, params.brightness_B[i]),
        "contrast": lambda x: tf.image.adjust_contrast(x, params.contrast_B[i]),
        "saturation": lambda x: tf.image.adjust_saturation(x, params.saturation_B[i]),
        "hue": lambda x: tf.image.adjust_hue(x, params.hue_B[i]),
    }
    x = tf.cast(image, tf.float32) / 255.0
    for name in order.split():
        x = tf.clip_by_value(operations[name](x), 0.0, 1.0)
    return x.numpy() * 255


def test_equals_tensorflows_operations_in_openvlas_order(images: np.ndarray) -> None:
    params = draw_params(len(images), np.random.default_rng(0))
    augmented = augment(images, params)
    assert augmented.dtype == np.uint8 and augmented.shape == images.shape
    for i, image in enumerate(images):
        assert np.abs(augmented[i] - one_by_one(image, params, i)).max() < 0.51  # rounding


@pytest.mark.parametrize(
    "order",
    [
        "crop contrast brightness saturation hue",
        "contrast crop brightness saturation hue",
        "crop brightness saturation contrast hue",
        "hue crop brightness contrast saturation",
    ],
)
def test_another_order_gives_another_image(images: np.ndarray, order: str) -> None:
    params = draw_params(len(images), np.random.default_rng(1))
    augmented = augment(images, params)
    differences = [
        np.abs(augmented[i] - one_by_one(image, params, i, order)).max()
        for i, image in enumerate(images)
    ]
    assert max(differences) > 1  # the right order is within rounding (0.51)


def test_ranges_are_openvlas() -> None:
    params = draw_params(4000, np.random.default_rng(0))
    sides = params.box_B4[:, 2:] - params.box_B4[:, :2]
    np.testing.assert_allclose(sides.prod(1), 0.9, rtol=1e-5)
    np.testing.assert_allclose(sides[:, 0], sides[:, 1], rtol=1e-5)
    assert params.box_B4.min() >= 0 and params.box_B4.max() <= 1
    for values, low, high in (
        (params.brightness_B, -0.2, 0.2),
        (params.contrast_B, 0.8, 1.2),
        (params.saturation_B, 0.8, 1.2),
        (params.hue_B, -0.05, 0.05),
        (params.box_B4[:, 0], 0, 1 - np.sqrt(0.9)),
    ):
        np.testing.assert_allclose(
            [values.min(), values.max()], [low, high], atol=0.002 * (high - low) + 1e-6
        )
    correlation = np.corrcoef(
        [params.box_B4[:, 0], params.box_B4[:, 1], params.brightness_B, params.hue_B]
    )
    assert np.abs(correlation - np.eye(4)).max() < 0.06  # independent


def test_the_seed_decides(images: np.ndarray) -> None:
    first, again, other = (
        augment(images, draw_params(4, np.random.default_rng(s))) for s in (5, 5, 6)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_prefetch_keeps_order_and_passes_errors_on() -> None:
    assert list(prefetch(range(50), depth=3)) == list(range(50))

    def failing():
        yield 1
        raise KeyError("broken record")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(KeyError, match="broken record"):
        next(items)


def test_prefetch_stops_with_its_consumer() -> None:
    produced = itertools.count()
    items = prefetch((next(produced) for _ in itertools.count()), depth=2)
    assert next(items) == 0
    items.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
    ahead = next(produced)
    assert ahead <= 5, "it ran far ahead"
    time.sleep(0.05)
    assert next(produced) == ahead + 1, "it still runs"
