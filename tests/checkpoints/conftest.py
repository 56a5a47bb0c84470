from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.forked import Server
from tests.trainers.methods import causal_model, saved_model


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    assert server.run("rest") == [0]
    yield server
    server.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, with the models they begin from."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("SFT", "GRPO"):
        saved_model(name, folder)
    # A head that is its embedding is refused where transformers spreads the model.
    causal_model(tie_word_embeddings=False).save_pretrained(folder / "SFT-policy-untied")
    return folder
