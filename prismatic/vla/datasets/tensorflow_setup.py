"""Tensorflow as a file reader: imported late, on few threads, never on a GPU.

Everything that needs tensorflow asks `load_tensorflow` for it. Importing it takes several seconds and its default
thread pools take every core, which the trainer and the simulators need.
"""

import logging
import os
from types import ModuleType

logger = logging.getLogger("ppo_vla.data")


def load_tensorflow(num_threads: int = 1) -> ModuleType:
    """Import tensorflow with `num_threads` threads per pool and no GPU; later calls return the same module.

    The pools are sized by the first call of the process: tensorflow cannot change them afterwards.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    try:
        # Not CUDA_VISIBLE_DEVICES: torch in the same process wants the GPU.
        tf.config.set_visible_devices([], "GPU")
        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
        tf.config.threading.set_inter_op_parallelism_threads(num_threads)
    except RuntimeError:
        # Already initialised, by us or by somebody else in the process.
        threads = tf.config.threading.get_inter_op_parallelism_threads()
        if threads != num_threads:
            logger.warning(
                "tensorflow already runs with %d threads; %d were asked for", threads, num_threads
            )
    return tf


def load_tfds(num_threads: int = 1) -> ModuleType:
    """Import tensorflow_datasets after `load_tensorflow`."""
    load_tensorflow(num_threads)
    import tensorflow_datasets as tfds

    return tfds
