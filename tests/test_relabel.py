"""Relabelling: uniform per instance, only tumor touched, instances kept apart, fixed by the generator."""

import pytest
import torch

from her2.data_classes import DEFAULT_CLASSES, ClassTable, TissueClass
from her2.relabel import relabel, repaint_mask
from her2.run_seeds import generator


def checkerboard(n):
    """n x n instances of 2 x 2 pixels that all touch, classes 1..5 in turn; the last column is background."""
    instance = torch.arange(1, n * n + 1, dtype=torch.int32).reshape(n, n)
    instance = instance.repeat_interleave(2, 0).repeat_interleave(2, 1)
    label = (instance.long() - 1) % 5 + 1
    instance[:, -1], label[:, -1] = 0, 0
    return label, instance


def test_every_subtype_is_equally_likely_for_every_instance():
    label, instance = checkerboard(10)
    counts, draws = torch.zeros(101, 6), 500
    for k in range(draws):
        _, mapping = relabel(label, instance, DEFAULT_CLASSES, generator("uniform", k))
        for i, (_, new) in mapping.items():
            counts[i, new] += 1
    seen = counts[counts.sum(1) > 0]
    assert len(seen) == 100 and (seen[:, 0] == 0).all()
    expected = draws / 5
    chi2 = ((seen[:, 1:] - expected) ** 2 / expected).sum(1)    # 4 degrees of freedom each, 100 instances
    assert chi2.max() < 30, "one instance prefers a subtype (p < 1e-5)"
    assert abs(chi2.mean() - 4) < 1.4, f"mean {chi2.mean():.2f}, expected 4 +- 0.28"


def test_only_tumor_changes_and_each_instance_as_a_whole():
    label, instance = checkerboard(8)
    before = label.clone(), instance.clone()
    new_label, mapping = relabel(label, instance, DEFAULT_CLASSES, generator(1))
    assert torch.equal(label, before[0]) and torch.equal(instance, before[1]), "inputs were written to"
    assert (new_label[instance == 0] == 0).all()
    assert sorted(mapping) == sorted(set(instance[instance > 0].tolist()))
    for i, (old, new) in mapping.items():                      # pixel by pixel, the slow way
        for y, x in (instance == i).nonzero().tolist():
            assert label[y, x] == old and new_label[y, x] == new


def test_touching_instances_draw_their_own_subtype():
    label = torch.ones(4, 8, dtype=torch.long)
    instance = torch.ones(4, 8, dtype=torch.int32)
    instance[:, 4:] = 2
    drawn = [relabel(label, instance, DEFAULT_CLASSES, generator("touch", k))[1] for k in range(200)]
    assert {(m[1][1], m[2][1]) for m in drawn} == {(a, b) for a in range(1, 6) for b in range(1, 6)}


def test_same_generator_same_result_and_other_generator_another():
    label, instance = checkerboard(8)
    first, again, other = (relabel(label, instance, DEFAULT_CLASSES, generator(k)) for k in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert not torch.equal(first[0], other[0])


def test_the_subtypes_to_draw_from_can_be_narrowed():
    label, instance = checkerboard(8)
    new_label, mapping = relabel(label, instance, DEFAULT_CLASSES, generator(5), relabel_class_ids=[1, 4])
    assert {new for _, new in mapping.values()} == {1, 4} == set(new_label[instance > 0].tolist())
    assert {old for old, _ in mapping.values()} == {1, 2, 3, 4, 5}
    for wrong in ([0], [6], []):
        with pytest.raises(AssertionError):
            relabel(label, instance, DEFAULT_CLASSES, generator(5), relabel_class_ids=wrong)


def test_classes_that_are_no_tumor_are_background():
    classes = ClassTable([TissueClass(0, "Background", False, False, (255, 255, 255)),
                          TissueClass(1, "Duct", False, False, (1, 1, 1)),
                          TissueClass(2, "A", True, True, (2, 2, 2)),
                          TissueClass(3, "B", True, True, (3, 3, 3))])
    label = torch.tensor([[0, 1, 1, 2, 2, 3]])
    instance = torch.tensor([[0, 1, 1, 2, 2, 3]], dtype=torch.int32)
    for k in range(20):
        new_label, mapping = relabel(label, instance, classes, generator("duct", k))
        assert new_label[0, :3].tolist() == [0, 1, 1] and sorted(mapping) == [2, 3]


def test_a_patch_without_tumor_comes_back_unchanged():
    label, instance = torch.zeros(6, 6, dtype=torch.long), torch.zeros(6, 6, dtype=torch.int32)
    new_label, mapping = relabel(label, instance, DEFAULT_CLASSES, generator(0))
    assert torch.equal(new_label, label) and mapping == {}
    assert not repaint_mask(instance, mapping).any()


def test_repaint_covers_every_relabelled_instance_also_one_that_kept_its_subtype():
    label, instance = checkerboard(6)
    _, mapping = relabel(label, instance, DEFAULT_CLASSES, generator(2))
    assert any(old == new for old, new in mapping.values()), "the case is not in this draw"
    repaint = repaint_mask(instance, mapping)
    assert repaint.dtype == torch.bool and torch.equal(repaint, instance > 0)
    some = {i: mapping[i] for i in list(mapping)[::3]}
    expected = torch.tensor([[int(i) in some for i in row] for row in instance])
    assert torch.equal(repaint_mask(instance, some), expected)
