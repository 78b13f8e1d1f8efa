"""New classes for the tumor instances of a patch: the masks from which synthetic images are made.

The paper (section 2.2) takes a real patch and gives every tumor tissue instance a new "subtype" at random, a
tumor class, so that the synthetic dataset as a whole is balanced:

    new_label[instance == i] = new(i),   new(i) ~ U(relabel_class_ids)   for every tumor instance i

Background and pixels to be ignored keep their label. The draw is per instance, never per pixel or connected
region, so two touching instances get classes of their own and neither swallows the other: `instance` itself
does not change.

Why this balances: new(i) does not depend on the instance, so every class is expected to get the same share
of all tumor area, whatever the areas and the old classes were. With few instances the shares scatter: n of
equal area and K classes give 1/K with a deviation of sqrt((1 - 1/K) / (n K)), for 5 classes .08 at n = 25.
"""

import torch


def relabel(label, instance, classes, generator: torch.Generator, relabel_class_ids=None):
    """Draw a class for every tumor instance of a patch. label (H, W) class ids and instance (H, W) ids ->
    new_label (H, W) and {instance id: (old, new)}. `classes` is the class table; `relabel_class_ids` narrows
    the classes to draw from. The result depends on the inputs and the generator's state alone: instances
    draw in the order of their ids."""
    assert label.ndim == 2 and label.shape == instance.shape, f"{tuple(label.shape)}, {tuple(instance.shape)}"
    # PAPER: "a new, randomly selected subtype label": ours is one of all five tumor classes, LCIS/DCIS among
    # them; the old one may be drawn again, else the balance would depend on what the patch held before.
    # U(choices) for an instance as a whole. Drawn per pixel, one nest would be confetti of all classes: a
    # label that no tissue has, and of which a generator can only paint the mean.
    choices = list(classes.tumor_ids if relabel_class_ids is None else relabel_class_ids)
    assert choices and set(choices) <= set(classes.tumor_ids), f"{choices} are not tumor classes"
    new_label, mapping = label.clone(), {}
    for i in torch.unique(instance).tolist():
        pixels = instance == i                                                         # (H, W)
        old = int(label[pixels][0])
        assert (label[pixels] == old).all(), f"instance {i} has more than one class"
        if old in classes.tumor_ids:
            new = new_label[pixels] = choices[int(torch.randint(len(choices), (), generator=generator))]
            mapping[i] = (old, new)
    return new_label, mapping


def renumber(instance: torch.Tensor) -> torch.Tensor:
    """Instance ids (H, W) of a patch -> 1, 2, .. in the same order, 0 = background; int32 (H, W)."""
    ids = instance.unique()
    return torch.searchsorted(ids[ids > 0], instance.contiguous()).add(1).where(instance > 0, 0).int()


def repaint_mask(instance: torch.Tensor, mapping: dict) -> torch.Tensor:
    """The pixels that inpainting regenerates: bool (H, W), True on every instance of `mapping`."""
    # PAPER: inpainting "modifies the tumor tissue instances". One that drew its old class is repainted like
    # the others: one rule, and no real tumor is left in a synthetic image for its label to be learned from.
    return torch.isin(instance, instance.new_tensor(list(mapping)))                    # (H, W)
