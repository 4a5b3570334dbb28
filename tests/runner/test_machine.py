"""The machine: memory is given back between stages."""

import gc
import weakref

from influence_kit.runner.machine import release_memory


def test_what_refers_to_itself_is_released():
    class Model:
        pass

    model = Model()
    model.own, left = model, weakref.ref(model)
    gc.disable()
    try:
        del model
        assert left() is not None
        release_memory()
        assert left() is None
    finally:
        gc.enable()
