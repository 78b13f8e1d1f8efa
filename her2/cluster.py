"""Other tumor classes for a dataset: clusters that nobody annotated, or subtypes joined to fewer.

    python -m her2.cluster DIR --classes 4                                  0: as many as BIC says
    python -m her2.cluster DIR --merge "non-stained=0; stained=1+,2+,3+"    LCIS/DCIS stays

The result, OUT, is a dataset with the same images, slides and splits, new masks and a new classes.json (of a
merge with the old names as aliases: where labels are polygons, that file alone does it). To see whether the
new classes help, generate with OUT and segment with DIR, whose classes remain those of the evaluation:

    python train_ldm.py --stage autoencoder --data OUT --out runs/vq          the diffusion likewise
    python generate.py --data OUT --model runs/ldm --relabel-classes "non-stained,stained" --out data/synth
    python train_seg.py --data DIR --synthetic data/synth --name ldm-100-stained        tumor or not is used

An instance is three numbers, x = log of (mean, standard deviation, mean gradient) of its DAB density: how
much stain, how uneven, how much of it in edges such as membranes. To those of the training slides, scaled to
mean 0 and sd 1, a mixture of K Gaussians is fitted; the most probable one is the cluster of an instance:

    p(x) = sum_k w_k N(x; m_k, C_k)         expectation and maximisation from k-means++ centres
    BIC(K) = -2 log likelihood + (K - 1 + K D + K D (D + 1) / 2) log n        the least one chooses K

PAPER: section 5 suggests subtypes without annotation, section 4 stained against non-stained, untried.
Sources: k-means++, Arthur & Vassilvitskii (2007); BIC, Schwarz (1978); Hubert & Arabie (1985).
Key: n instances, K clusters, D features, N largest instance id of a region.
"""

import colorsys
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from her2 import draw, report, run, run_config as configuration
from her2.data_classes import ClassTable, TissueClass, csv_text
from her2.data_folder import load_dataset
from her2.data_mapped import open_region
from her2.data_regions import region_files
from her2.report_staining import SMALLEST
from her2.run_errors import UserError, atomic_write, check_line, command, script_line
from her2.run_provenance import input_hashes
from her2.run_seeds import numpy_generator
from her2.stains import deconvolve, white_point

FAINT = 0.005           # optical density below which DAB is noise: the logarithm ends there
STARTS, MOST = 5, 8     # fits per K, of which the best is kept; largest K that BIC is asked about
LEAST_VARIANCE = 1e-3   # added to all variances, lest a cluster of equal instances has none
PER_CLUSTER = 5         # instances at least: fewer do not determine a covariance of three features


@dataclass
class Config:
    data: str = ""                  # the same as DIR
    out: str = ""                   # folder of the new one; empty: DIR-clusters or DIR-merged
    classes: int = 0                # number of clusters; 0: the one with the least BIC, 2 to 8
    merge: str = ""                 # join classes instead: "NEW=OLD,OLD; NEW=OLD"
    seed: int = 0                   # decides where the clustering starts
    split_seed: int = 0             # decides the split of slides when slides.csv has none
    cache: str = "cache"            # folder for the decoded images


def main(argv):
    config, folder = configuration.parse(Config, {}, argv, __doc__, "python -m her2.cluster", {
        "folder": dict(nargs="?", metavar="DIR", help="dataset folder")})
    if folder and config.data and folder != config.data:
        raise UserError(f"{folder} and --data {config.data}: two folders; give one of them")
    config.data = folder or config.data
    config.out = config.out or config.data.rstrip("/\\") + ("-merged" if config.merge else "-clusters")
    dataset = load_dataset(config.data, seed=config.split_seed)
    files = region_files(dataset.rois, dataset.classes, config.cache)   # not all open: systems limit handles
    if config.merge:
        table, meaning = merged(dataset.classes, config.merge)
    else:
        found = instances(dataset, files)
        member, record = cluster(dataset, found, config)
        table, meaning = clusters_table(dataset.classes, member.max() + 1)
    class_of = [meaning[open_region(file).class_of] for file in files]  # the new class of each instance
    folder = run.open_run("her2.cluster", config, "cpu", ["-m", "her2.cluster", *argv],
                          input_hashes(config, dataset))
    if not config.merge:
        for roi, i, k in zip(found["roi"], found["id"], member):
            class_of[roi][i] = table.tumor_ids[k]
        run.write_json(folder / "clusters.json", record)
    write_dataset(folder, dataset, table, files, class_of)
    print(f"done: {folder}, tumor classes {', '.join(table.names[k] for k in table.tumor_ids)}; "
          f"to look at them: {check_line(folder)}; next: "
          f"{script_line('train_ldm.py', '--stage', 'autoencoder', '--data', folder)}")


def merged(classes, text: str):
    """"NEW=OLD,OLD; ..." -> (new table, (256,) uint8: the new id of each old one). UserError says why not."""
    target = {}                                                 # {old id: new name}
    for part in filter(str.strip, text.split(";")):
        new, _, olds = (piece.strip() for piece in part.partition("="))
        ids = {classes.id_of(old) if classes.knows(old) else None for old in olds.split(",")}
        if ids & target.keys() or ids - set(classes.tumor_ids):
            known = ", ".join(repr(classes.names[k]) for k in classes.tumor_ids)
            raise UserError(f"--merge: found {part.strip()!r}; give NEW=OLD,OLD, each OLD once, of {known}")
        target |= dict.fromkeys(ids, new)
    groups = {}             # {new name, or the id of a class that stays: old classes}, in their order
    for c in classes.classes:
        groups.setdefault(target.get(c.id, c.id), []).append(c)
    meaning = np.arange(256, dtype=np.uint8)                    # what has no class (IGNORE) stays what it is
    for k, olds in enumerate(groups.values()):
        meaning[[c.id for c in olds]] = k
    rows = [replace(olds[0], id=k, name=target.get(olds[0].id, olds[0].name),
                    variance=any(c.variance for c in olds)) for k, olds in enumerate(groups.values())]
    aliases = {**classes.aliases, **{classes.names[k]: k for k in target}}
    try:
        return ClassTable(rows, [(alias, int(meaning[k])) for alias, k in aliases.items()]), meaning
    except ValueError as error:         # a new name that is empty, or also another class's
        raise UserError(f"--merge {text!r}: {error}; give NEW=OLD,OLD") from error


def clusters_table(classes, K: int):
    """The same of clusters: the classes that are no tumor stay, K new ones follow."""
    kept, meaning = [c for c in classes.classes if not c.tumor], np.arange(256, dtype=np.uint8)
    meaning[[c.id for c in kept]] = np.arange(len(kept))
    rows = [replace(c, id=i) for i, c in enumerate(kept)]
    for k in range(K):
        color = tuple(round(255 * v) for v in colorsys.hsv_to_rgb(k / K, 0.75, 0.85))
        rows.append(TissueClass(len(rows), f"cluster {k + 1}", True, True, color))
    return ClassTable(rows), meaning


def instances(dataset, files) -> dict:
    """The n tumor instances of all regions: {"roi", "id", "pixels", "class": (n,), "x": (n, 3)}."""
    parts = []
    for roi, file in enumerate(tqdm(files, desc="instances", leave=False, disable=None)):
        region = open_region(file)
        pixels, *sums = instance_sums(region)
        ids = np.flatnonzero(np.isin(region.class_of, dataset.classes.tumor_ids) & (pixels > 0))
        mean, square, gradient = (total[ids] / pixels[ids] for total in sums)
        x = np.stack([mean, np.sqrt(np.maximum(square - mean ** 2, 0)), gradient], axis=1)
        # Logarithms: staining differs by factors, and the spread of 3+ would drown that of 0 and 1+.
        parts.append((np.full(len(ids), roi), ids, pixels[ids], region.class_of[ids],
                      np.log(np.maximum(x, FAINT))))
    return dict(zip(("roi", "id", "pixels", "class", "x"), map(np.concatenate, zip(*parts))))


def instance_sums(region, strip: int = 512) -> np.ndarray:
    """(4, N + 1): pixels of each instance; sums over them of DAB, of its square, of its gradient's length."""
    white, sums = white_point(region.image[::8, ::8]), np.zeros((4, len(region.class_of)))
    for top in range(0, region.height, strip):                  # a whole region in float64 takes gigabytes
        dab = deconvolve(region.image[top:top + strip + 1], white)[1]       # a row more, for the gradient
        gradient = np.hypot(np.diff(dab, axis=0, append=dab[-1:]), np.diff(dab, axis=1, append=dab[:, -1:]))
        which = region.instance[top:top + strip].reshape(-1)
        for total, values in zip(sums, (np.ones_like(dab), dab, dab ** 2, gradient)):
            total += np.bincount(which, weights=values[:strip].reshape(-1), minlength=len(total))
    return sums


def log_joint(x, w, m, C) -> np.ndarray:
    """log w_k + log N(x; m_k, C_k), (n, K): x (n, D), weights (K,), means (K, D), covariances (K, D, D)."""
    away = x[:, None] - m                                                               # (n, K, D)
    distance = (np.einsum("nki,kij->nkj", away, np.linalg.inv(C)) * away).sum(axis=2)
    return np.log(w) - (distance + np.linalg.slogdet(C)[1] + x.shape[1] * np.log(2 * np.pi)) / 2


def fit(x, K: int, rng):
    """(log likelihood of x (n, D), (w, m, C)): the best of STARTS mixtures."""
    fits = []
    for _ in range(STARTS):                                     # each ends in the optimum nearest to it
        m = x[[rng.integers(len(x))]]
        while len(m) < K:                                       # k-means++: the next one far from all so far
            far = ((x[:, None] - m) ** 2).sum(axis=2).min(axis=1) + 1e-12
            m = np.concatenate([m, x[[rng.choice(len(x), p=far / far.sum())]]])
        share = np.eye(K)[((x[:, None] - m) ** 2).sum(axis=2).argmin(axis=1)]           # (n, K)
        total, gain = -np.inf, np.inf
        while gain > 1e-5 * len(x):
            # Maximisation: weight, mean and covariance of each cluster, every instance counting by its share.
            size = share.sum(axis=0) + 1e-9                                             # (K,)
            m = share.T @ x / size[:, None]
            away = x[:, None] - m                                                       # (n, K, D)
            C = np.einsum("nki,nkj->kij", share[:, :, None] * away, away) / size[:, None, None]
            mixture = size / size.sum(), m, C + LEAST_VARIANCE * np.eye(x.shape[1])
            # Expectation: how much each cluster explains of each instance. The likelihood never falls.
            joint = log_joint(x, *mixture)
            evidence = np.logaddexp.reduce(joint, axis=1)                               # (n,) log p(x)
            share = np.exp(joint - evidence[:, None])
            total, gain = evidence.sum(), evidence.sum() - total
        fits.append((size.min() > x.shape[1], float(total), mixture))
    # On D instances or fewer a cluster shrinks to a likelihood without bound: such a mixture comes last.
    return max(fits, key=lambda one: one[:2])[1:]


def adjusted_rand(a, b) -> float:
    """Agreement of two groupings (n,) of the same things: 1 = the same groups, 0 = what chance gives."""
    counts = np.zeros((max(a) + 1, max(b) + 1))
    np.add.at(counts, (a, b), 1)
    # Pairs that are together in both, against those expected of groups of the same sizes.
    both, first, second, every = ((c * (c - 1) / 2).sum()
                                  for c in (counts, counts.sum(axis=1), counts.sum(axis=0), counts.sum()))
    chance, most = first * second / max(every, 1), (first + second) / 2
    return float((both - chance) / (most - chance)) if most > chance else 1.0


def cluster(dataset, found, config):
    """(cluster 0..K-1 of each instance (n,), by the amount of DAB; record for clusters.json). Prints it."""
    train = np.array([roi.split == "train" for roi in dataset.rois])[found["roi"]]      # (n,)
    large = found["pixels"] >= SMALLEST         # cut off by the border: a few pixels have no typical staining
    x = found["x"][train & large]
    wanted = [config.classes] if config.classes else range(2, MOST + 1)
    choices = [K for K in wanted if len(x) >= PER_CLUSTER * K]
    if not choices:
        raise UserError(f"{dataset.root}: {len(x)} tumor instances of {SMALLEST} pixels or more in the "
                        f"training slides are too few for {wanted[0]} clusters; annotate more")
    shift, scale, (n, D) = x.mean(axis=0), x.std(axis=0) + 1e-9, x.shape
    fits = {K: fit((x - shift) / scale, K, numpy_generator(config.seed, "cluster", K)) for K in choices}
    bic = {k: (k - 1 + k * D + k * D * (D + 1) / 2) * np.log(n) - 2 * total for k, (total, _) in fits.items()}
    K = min(bic, key=bic.get)
    _, mixture = fits[K]
    member = log_joint((found["x"] - shift) / scale, *mixture).argmax(axis=1)
    member = np.argsort(np.argsort(mixture[1][:, 0]))[member]   # ranks by the mean DAB

    tumor, names = dataset.classes.tumor_ids, dataset.classes.names
    rows = [["cluster", "instances", *(names[i] for i in tumor)]]
    for k in range(K):
        classes = found["class"][large & (member == k)]
        rows.append([str(k + 1), str(len(classes)), *(str((classes == i).sum()) for i in tumor)])
    agreement = {part: adjusted_rand(member[here], found["class"][here])
                 for part, here in (("train", large & train), ("val and test", large & ~train)) if here.any()}
    print(report.plain([dict(zip(rows[0], row)) for row in rows[1:]]))
    print("BIC:", ", ".join(f"{k} clusters {value:.0f}" for k, value in bic.items()))
    print("adjusted Rand index against the annotated subtypes:",
          ", ".join(f"{value:.2f} ({part})" for part, value in agreement.items()))
    return member, {"bic": bic, "adjusted_rand": agreement, "table": rows}


def write_dataset(folder, dataset, table, files, class_of) -> None:
    """Images as they are, masks by `class_of` (N + 1,) of each region, classes.json, and slides.csv last."""
    rows = []
    for roi, file, new in zip(tqdm(dataset.rois, "writing", leave=False, disable=None), files, class_of):
        instance = np.array(open_region(file).instance, dtype=np.int32)                   # (H, W)
        if instance.max() > 65535:
            raise UserError(f"{roi.image}: {instance.max()} instances, too many for a 16-bit PNG; cut it up")
        mask, numbers = (f"{kind}/{roi.name.removesuffix('.png')}.png" for kind in ("masks", "instances"))
        atomic_write(folder / roi.name, roi.image.read_bytes())
        draw.save_png(folder / mask, new[instance], palette=table.colors)
        draw.save_png(folder / numbers, instance)
        rows.append({"image": roi.name, "mask": mask, "instances": numbers, "slide": roi.slide,
                     "score": roi.score, "split": roi.split})
    run.write_json(folder / "classes.json", table.to_json())
    atomic_write(folder / "slides.csv", csv_text(rows))


if __name__ == "__main__":
    command(main)
