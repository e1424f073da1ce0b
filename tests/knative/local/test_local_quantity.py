"""Amounts as Kubernetes writes them."""

import pytest

from knative.local import quantity


@pytest.mark.parametrize(
    ("written", "amount"),
    [
        (2, 2),
        (0.5, 0.5),
        ("2", 2),
        ("500m", 0.5),
        (".5", 0.5),
        ("1.5Gi", 1.5 * 2**30),
        ("128974848", 128974848),
        ("129e6", 129e6),
        ("129M", 129e6),
        ("123Mi", 123 * 2**20),
        ("1E", 1e18),
        ("1k", 1000),
        ("1Ki", 1024),
    ],
)
def test_a_quantity_stands_for_a_number(written: object, amount: float) -> None:
    assert quantity.parse(written) == amount


@pytest.mark.parametrize("written", ["", "1 Gi", "1Gib", "1K", "-1", "Gi", "1,5", True, None, [1], "1e"])
def test_anything_else_is_none(written: object) -> None:
    with pytest.raises(ValueError, match=r"must be a quantity|there is no suffix"):
        quantity.parse(written)


@pytest.mark.parametrize(("amount", "shown"), [(512, "512"), (1536, "1.5Ki"), (300 * 2**20, "300Mi"), (2**31, "2Gi")])
def test_bytes_are_shown_in_the_unit_of_manifests(amount: int, shown: str) -> None:
    assert quantity.show_bytes(amount) == shown
