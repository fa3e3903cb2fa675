"""benchmarks/products.py: what its medians are of."""

import torch

from benchmarks import products


def test_arms_take_turns_and_the_first_round_does_not_count() -> None:
    called: list[tuple[str, int]] = []

    def arm(name: str) -> products.Product:
        def product(x: torch.Tensor, number: int) -> torch.Tensor:
            called.append((name, number))
            return x

        return product

    seconds = products.timed({"a": arm("a"), "b": arm("b")}, torch.ones(1, 1), count=2, rounds=3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)
    # Four rounds, each of both arms and of every layer, every second one the other way round.
    assert [name for name, number in called if number == 0] == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [number for _, number in called] == [0, 1] * 8
