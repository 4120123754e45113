"""The names that notebooks use."""

import utils


def test_utils_offers_the_names_that_it_lists():
    assert len(set(utils.__all__)) == len(utils.__all__) > 40
    assert [name for name in utils.__all__ if not hasattr(utils, name)] == []
