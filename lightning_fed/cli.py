"""The command line: LightningCLI, with the short names of this package's classes.

``lightning-fed fit --config experiment.yaml --trainer.strategy DFedSAMStrategy --trainer.strategy.rho 0.05``
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

# jsonargparse resolves a short class name only among the classes that are already imported.
import lightning_fed
import lightning_fed.callbacks
import lightning_fed.data
import lightning_fed.modules  # noqa: F401
from lightning_fed import launch, sample

PICTURE_SUFFIXES = {".png", ".svg", ".pdf", ".gif"}


class FederatedCLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule, seeded with 0 unless told otherwise.

    Args:
        args: what follows the program's name; by default that of this process.
        run: whether to run the subcommand that ``args`` begins with. With False, ``args`` has no subcommand, and the
            parsed objects are left in ``model``, ``datamodule`` and ``trainer``.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            # A run that is repeated in the same place replaces its own config.
            save_config_kwargs={"overwrite": True},
            run=run,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Test the final model after `fit`.")

    def after_fit(self) -> None:
        """Test if asked to, and print where the results are, once for all ranks."""
        if self.config.fit.test_after_fit:
            self.trainer.test(self.model, self.datamodule)
        if self.trainer.is_global_zero:
            for kind, place in results(self.trainer):
                print(f"{kind + ':':<13}{place}")


def results(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """What a finished run has left on disk.

    Args:
        trainer: after ``fit``, on rank zero.

    Yields:
        kind and place: each logger's folder, each folder of pictures within, each callback's best and last checkpoint.
    """
    # Not trainer.log_dir: that is a broadcast, which needs all ranks alive.
    folders = [folder for logger in trainer.loggers if (folder := logger.log_dir or logger.save_dir)]
    folders = list(dict.fromkeys(str(folder) for folder in folders)) or [trainer.default_root_dir]
    for folder in folders:
        yield "logs", folder
    # A set: one logger's folder may lie within another's.
    files = {file for folder in folders for file in Path(folder).rglob("*") if file.suffix in PICTURE_SUFFIXES}
    for parent, count in sorted(Counter(file.parent for file in files).items()):
        yield "pictures", f"{parent} ({count})"
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            for path in dict.fromkeys(filter(None, (callback.best_model_path, callback.last_model_path))):
                yield "checkpoint", path


def main(args: ArgsType = None) -> None:
    """Run ``lightning-fed``: LightningCLI's subcommands, ``launch`` (:mod:`lightning_fed.launch`) and ``sample``.

    For the last, see :mod:`lightning_fed.sample`.

    Args:
        args: what follows the program's name; by default that of this process.
    """
    arguments = sys.argv[1:] if args is None else args
    if isinstance(arguments, list) and arguments[:1] == ["launch"]:
        sys.exit(launch.main(arguments[1:]))
    if isinstance(arguments, list) and arguments[:1] == ["sample"]:
        sys.exit(sample.main(arguments[1:]))
    # Lightning's use of torch's trees, of which a user can change nothing.
    warnings.filterwarnings("ignore", ".*LeafSpec")
    FederatedCLI(args)
