"""``bench.accuracy``: gradients of half images are nearer to float64 than PyTorch's; the table in docs/."""

from pathlib import Path

import pytest
import torch

from bench import accuracy

NUMBERS = Path(__file__).resolve().parent.parent / "docs" / "numbers.md"
REDUCED = {"channels": (3,), "size": 16}


pytestmark = pytest.mark.xdist_group("accuracy")  # the errors are measured once


@pytest.fixture(scope="module")
def found():
    return list(accuracy.measure_all(accuracy.HALVES, **REDUCED))


def test_half_gradients_are_nearer_to_float64_than_pytorchs(found):
    """d image and d parameters: every case, both half types, both paddings, both ways PyTorch has."""
    assert len(found) == len(accuracy.CASES) * len(accuracy.HALVES) * len(accuracy.PADDINGS)
    assert not [accuracy.line(errors) for errors in accuracy.failures(found)]


def test_errors_are_those_of_one_rounding(found):
    """Ours are of the order of the half type itself, however many outputs add up in a pixel."""
    for errors in found:
        assert max(errors.ours) < 4 * torch.finfo(errors.dtype).eps, accuracy.line(errors)


def test_a_larger_error_is_a_failure(found):
    """The command fails if either gradient of a half image is worse, or is no number."""
    good = found[0]
    for image, params in ((1.0, 0.0), (0.0, 1.0), (float("nan"), 0.0)):
        errors = good._replace(ours=accuracy.Pair(image, params))
        assert accuracy.failures([good, errors]) == [errors]
        assert not accuracy.failures([errors._replace(dtype=torch.float32)])


def test_exact_gradients_need_no_more_than_float64():
    """What the errors are measured against: our own float64 gradients agree with PyTorch's."""
    for case in accuracy.CASES:
        inputs = accuracy.make_inputs(case, 3, torch.float64, 16)
        exact = accuracy.exact_gradients(inputs, "border")
        assert max(accuracy.relative_errors(accuracy.our_gradients(inputs, "border"), exact)) < 1e-11


def test_documentation_has_the_table(found):
    """Its columns and its rows are those of the command; the digits are the full measurement's."""

    def labels(text):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text]
        return [rows[0], *(row[:2] + ["-" if cell == "-" else "" for cell in row[2:]] for row in rows[1:])]

    table = accuracy.markdown(found).splitlines()
    lines = NUMBERS.read_text(encoding="utf-8").splitlines()
    assert table[0] in lines, "python -m bench.accuracy --markdown makes another table"
    start = lines.index(table[0])
    assert labels(lines[start : start + len(table)]) == labels(table)
    assert not lines[start + len(table)].startswith("|")
    assert "python -m bench.accuracy --markdown" in "\n".join(lines[:start])
