import calmerge.report


def test_public_names_are_sorted_and_exist() -> None:
    assert calmerge.report.__all__ == sorted(calmerge.report.__all__)
    assert all(hasattr(calmerge.report, name) for name in calmerge.report.__all__)
