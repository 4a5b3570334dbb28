"""The machine: memory is given back between stages."""

import gc
import weakref

import pytest

from influence_kit.runner import machine


@pytest.mark.parametrize("much", [True, False])
def test_what_refers_to_itself_is_released_where_much_was_held(much, monkeypatch):
    class Model:
        pass

    model = Model()
    model.own, left = model, weakref.ref(model)
    monkeypatch.setattr(machine, "peak_memory", lambda: machine.RELEASED if much else machine.RELEASED - 1)
    gc.disable()
    try:
        del model
        assert left() is not None
        machine.release_memory()
        assert (left() is None) == much
    finally:
        gc.enable()
