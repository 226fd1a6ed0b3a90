"""What the tests' own layouts leave behind: nothing."""

import pickle

from tests.engine.interop.layouts import importable


def test_names_mean_afterwards_what_they_did() -> None:
    from transformers import RobertaConfig

    stand_in = type("RobertaConfig", (), {"__module__": RobertaConfig.__module__})
    with importable(stand_in, stand_in):
        pickle.dumps(stand_in)
    pickle.dumps(RobertaConfig)
