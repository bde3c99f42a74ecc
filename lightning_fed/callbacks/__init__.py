"""What to watch in a federation while it trains."""

from lightning_fed.callbacks.federation_monitor import FederationMonitor
from lightning_fed.callbacks.round_progress_bar import RoundProgressBar

__all__ = ["FederationMonitor", "RoundProgressBar"]
