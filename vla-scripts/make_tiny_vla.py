"""Write an OpenVLA policy with random weights: the 7B's architecture, parameter names and files at a size of choice.

Examples:
    python vla-scripts/make_tiny_vla.py --output_dir runs/tiny --seed 0
    python vla-scripts/make_tiny_vla.py --output_dir /dev/shm/openvla-7b --size 7b
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.extern.hf.tiny_config import TinyVLAConfig


@dataclass(frozen=True, kw_only=True)
class Args(TinyVLAConfig):
    """Where to write the folder, and the sizes of the policy."""

    output_dir: str
    """Folder to write; it must be empty or not exist."""
    size: Literal["tiny", "small", "7b"] = "tiny"
    """tiny: the sizes below. small: 25 M parameters at 140 pixels. 7b: openvla-7b's exact shape in bfloat16 (15 GB),
    made on the GPU where there is one. The last two come with action statistics for tabletop."""


if __name__ == "__main__":
    # Here, because the imports below take ten seconds, and --help and mistyped flags need none of them.
    arguments = tyro.cli(
        Args,
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
        use_underscores=True,
    )


from prismatic.extern.hf.random_prismatic import save_random_vla
from prismatic.extern.hf.tiny_prismatic import save_tiny_vla, validate_tiny
from utils.command_line import REFUSED, Bound, CommandLineError, bound_problems, raise_problems
from utils.logging_utils import get_logger
from utils.output_folders import output_problems

logger = get_logger(__name__)

BOUNDS = {"seed": Bound(0, 1e12, reason="a larger one is a slip")}


def validate(args: Args) -> None:
    """Raise CommandLineError with all problems.

    These are sizes that cannot work or that `--size` does not read, and a folder that cannot be written or is taken.
    """
    problems = bound_problems(args, BOUNDS) + output_problems("--output_dir", args.output_dir)
    given = [
        f"--{f.name}"
        for f in fields(TinyVLAConfig)
        if f.name != "seed" and getattr(args, f.name) != f.default
    ]
    if args.size != "tiny" and given:
        problems.append(
            f"--size {args.size} has sizes of its own: remove {', '.join(given)}, or use --size tiny"
        )
    try:
        validate_tiny(args)
    except ValueError as error:
        problems += [f"--{line}" for line in str(error).splitlines()]
    raise_problems(problems)


def main(args: Args) -> None:
    """Make the folder. Raises CommandLineError when it holds something already or a size cannot work."""
    validate(args)
    if args.size == "tiny":
        model = save_tiny_vla(args, args.output_dir)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
    else:
        num_parameters = save_random_vla(args.size, args.output_dir, args.seed)
    logger.info(f"{args.output_dir}: {num_parameters / 1e6:.2f} M parameters, seed {args.seed}")


if __name__ == "__main__":
    try:
        main(arguments)
    except CommandLineError as error:
        logger.error("%s", error)
        sys.exit(REFUSED)
