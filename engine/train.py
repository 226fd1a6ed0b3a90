"""Entry point of all trainings.

    deepspeed engine/train.py --config configs/demo/vqgan.yaml [key=value …]
    python engine/train.py --config … [key=value …]            one process, the same computation

Exit codes: 0 done (or already finished), 2 bad input (one line on stderr), 130 and 143 stopped by SIGINT or SIGTERM with
a checkpoint, 1 a bug.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without argparse's usage above it."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main() -> int:
    parser = _Parser(description="Train VQGAN, dVAE, KoCLIP or KoDALLE.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file, e.g. configs/demo/vqgan.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. loop.steps=100 seed=7")
    # The launcher adds --local_rank; the rank is read from the environment.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()

    from engine.commands.error_lines import print_anything
    from engine.commands.missing_packages import as_input_error
    from engine.errors import InputError
    from engine.files import DiskFault

    print_anything()
    try:
        from engine.config_files import load_run
        from engine.config_folders import check_folders
        from engine.models.environment import check_torchvision

        run = load_run(arguments.config, arguments.overrides)
        check_folders(run)
        check_torchvision()
        from engine.training.trainer import train

        train(run)
    except (InputError, ModuleNotFoundError) as error:
        reported = as_input_error(error) if isinstance(error, ModuleNotFoundError) else error
        if reported is None:
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or isinstance(error, DiskFault):  # which may strike one rank alone
            print(f"error: {reported}" if rank == 0 else f"error (rank {rank}): {reported}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # before the first step, or after the last
    return 0


if __name__ == "__main__":
    # MKL's products of few columns, attention's above all, have other last bits where a buffer lies otherwise in memory, and a
    # resumed training must equal an uninterrupted one. MKL's own remedy must be requested before its first product: hence
    # here, and not where a library may have computed already.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    sys.exit(main())
