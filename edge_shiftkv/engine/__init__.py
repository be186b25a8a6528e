"""The steps of an answer, one by one: read a prompt, select, hand over, decode.

`Runtime` puts them together. By themselves they are for programs that want something in between, as the benches do:

    mixed = method("mixed")
    with Engine("text.gguf", "mmproj.gguf") as engine:
        prompt = engine.prompt([Message("user", (picture, "What is the total?"))])
        large, small = engine.context(prompt.n_tokens, engine.batch(prompt)), engine.context(128 + 100)
        prefilled = engine.read(prompt, large, n_query=mixed.n_query)
        sampler = Sampler(engine.model, Sampling())
        token = sampler.sample(large)
        selection = prefilled.select(mixed, 128)
        slot = Slot(small, sampler, prefilled.hand_over(small))
        while not engine.model.ends_generation(token):
            print(engine.model.piece(token).decode(errors="replace"), end="")
            token = slot.advance(token)
"""

from edge_shiftkv.engine.engine import Engine
from edge_shiftkv.engine.prefilled import Captured, Prefilled, ScoringMethod
from edge_shiftkv.engine.slot import Slot

__all__ = ["Captured", "Engine", "Prefilled", "ScoringMethod", "Slot"]
