"""Workers with a tiny model, for tests of what they generate and of how jobs end."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from serve.settings import ServeSettings
from serve.worker.worker import Worker
from tests.signers import write_signer


@pytest.fixture(scope="module")
def settings(kodalle_run: Path) -> ServeSettings:
    return ServeSettings(model=str(kodalle_run / "model"), num_slots=6, max_queued_sequences=64)


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificates and key."""
    return write_signer(tmp_path_factory.mktemp("signer"), ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def worker(settings: ServeSettings) -> Iterator[Worker]:
    """A worker for tests that leave it as they found it."""
    worker = Worker(settings)
    yield worker
    worker.close()


@pytest.fixture
def make_worker(settings: ServeSettings) -> Iterator[Callable[..., Worker]]:
    workers = []

    def make(**changes: Any) -> Worker:
        workers.append(Worker(settings.model_copy(update=changes)))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()
