"""One logger for the whole project and the metric writers (TensorBoard always, W&B on request)."""

import logging
import os

from rich.logging import RichHandler


def get_logger(name: str) -> logging.Logger:
    """Return a logger that writes to the console through rich; its level comes from `PPO_VLA_LOG_LEVEL` (INFO)."""
    root = logging.getLogger("ppo_vla")
    if not root.handlers:
        handler = RichHandler(show_path=False, log_time_format="%H:%M:%S", markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
        root.setLevel(os.environ.get("PPO_VLA_LOG_LEVEL", "INFO"))
        root.propagate = False
    return root.getChild(name)
