"""Data that knows its clients."""

from lightning_fed.data.client_data_module import ClientDataModule, Splits, labels_of
from lightning_fed.data.digits import DigitsDataModule
from lightning_fed.data.federated_dataset import FederatedDataset
from lightning_fed.data.gaussian_mixture import GaussianMixtureDataModule
from lightning_fed.data.image_folder import ImageFolderDataModule
from lightning_fed.data.label_flip import LabelFlip
from lightning_fed.data.modular_arithmetic import ModularArithmeticDataModule
from lightning_fed.data.vision import VisionDataModule

__all__ = [
    "ClientDataModule",
    "DigitsDataModule",
    "FederatedDataset",
    "GaussianMixtureDataModule",
    "ImageFolderDataModule",
    "LabelFlip",
    "ModularArithmeticDataModule",
    "Splits",
    "VisionDataModule",
    "labels_of",
]
