"""Write a random OpenVLA policy at a few million parameters: the 7B's architecture, parameter names and files.

Example:
    python vla-scripts/make_tiny_vla.py --output_dir runs/tiny --seed 0
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from prismatic.extern.hf.tiny_prismatic import TinyVLAConfig, save_tiny_vla
from utils.logging_utils import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Args(TinyVLAConfig):
    """Where to write the folder, and the sizes of the policy."""

    output_dir: str
    """Folder to write; it must be empty or not exist."""


def main(args: Args) -> None:
    """Make the folder. Raises ValueError when it holds something already or a size cannot work."""
    output_dir = Path(args.output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"--output_dir {output_dir} is not empty: give a new folder, or remove this one")
    model = save_tiny_vla(args, output_dir)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info(f"{output_dir}: {num_parameters / 1e6:.2f} M parameters, seed {args.seed}")


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes), use_underscores=True))
