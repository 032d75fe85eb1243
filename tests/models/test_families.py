"""Every dense family against Hugging Face transformers in float32: whole, in chunks, token by token
through the paged step; and each of its parameters is seen to matter.
"""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.models.families import CASES, TOKENS, TOLERANCE, build, errors, expected_logits, permuted


@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(name: str, tmp_path: Path) -> None:
    hf_model, driver = build(CASES[name], tmp_path)
    assert len(driver.runner.groups) == CASES[name].groups
    expected = expected_logits(hf_model)
    assert max(errors(driver, expected)) <= TOLERANCE
    # The comparison can fail: the same oracle with any one weight permuted is another model.
    got = driver.logits(TOKENS, [len(TOKENS)])
    unseen = [n for n, e in permuted(hf_model) if np.abs(got - e).max() <= 10 * TOLERANCE]
    assert not unseen
