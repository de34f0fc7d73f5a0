"""`python tests/kernel_mutants.py` as a test: `pytest -m mutants`. Takes about half an hour on two cores."""

import kernel_mutants
import pytest
from kernel_problems import needs_standin

pytestmark = needs_standin


@pytest.mark.mutants
def test_the_kernels_tests_kill_their_mutants():
    assert kernel_mutants.main([]) == 0


def test_mutants_are_edits_of_the_kernels():
    """Every rule still fits somewhere, and every mutant changes its line."""
    found = kernel_mutants.mutants(per_rule=0)
    assert {m.rule for m in found} == set(kernel_mutants.RULES)
    assert all(m.old != m.new for m in found)
    assert len(kernel_mutants.mutants()) >= 40
